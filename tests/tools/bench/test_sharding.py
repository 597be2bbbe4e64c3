"""tools/bench/sharding.py without a cluster: theory, table, figure."""

from math import inf

from tools.bench.sharding import plot, show
from tools.bench.sharding_ranks import SCHEMES, Measured


def measured(scheme: str, depth: int, seconds: list[float], **more) -> Measured:
    return Measured(scheme, depth, 2, 4, 1000, 100, seconds, **{"bytes_sent": 1000.0} | more)


def test_what_leaves_a_node_in_theory():
    sent = {name: scheme.bytes_sent(1000, 100, 2, 4) for name, scheme in SCHEMES.items()}
    assert sent["dp"] == 2 * 1000 * 3 / 4
    assert sent["zero2"] == sent["torch_fsdp"] == 3 * 1000 * 3 / 4
    assert sent["fsdp"] == sent["zero2"] - 100 * 3 / 4, "the last matrix is still gathered when the backward starts"
    assert sent["hsdp"] == sent["hsdp_sync"] == sent["torch_hsdp"] == 2 * 1000 / 2


def test_the_table_says_what_is_missing(tmp_path, capsys):
    results = [
        measured("fsdp", 4, [1.0, 1.2, 1.1], bytes_sent=2200.0),
        measured("hsdp", 4, [0.5, 0.5, 0.6], peak_mib=7.0),
        measured("zero2", 4, [1.0, 1.0, 1.0], peak_mib=inf),
    ]
    show(results)
    rows = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["hsdp"][3:5] == ["2.20", "1.83-2.40"]
    assert rows["hsdp"][-2:] == ["+0.0%", "7"]
    assert rows["fsdp"][-1] == "-", "memory was not measured"
    assert rows["zero2"][-2:] == ["no", "memory"]
    plot(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
