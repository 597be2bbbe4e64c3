"""Tables pool like a plain Python loop, start with the same values under any sharding, and dense features join them."""

from hashlib import blake2b

import pytest
import torch

from dhen.model import features
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.features import FeatureProcessing, PlainTables, SparseIds, draw_table, init_table
from dhen.planner.live_memory import LiveMemory

FEATURES = [
    {"name": "site", "num_embeddings": 11},
    {"name": "words", "num_embeddings": 7, "pooling": "mean"},
    {"name": "shops", "num_embeddings": 5, "pooling": "sum"},
]
D = 4


def make_tables(features=FEATURES):
    return PlainTables(DhenConfig(embedding_dim=D, sparse_features=features), seed=3).double()


def bags(batch_size=6, has_weights=True):
    """Random bags of 0 to 3 ids."""
    lengths_FB = torch.randint(0, 4, (len(FEATURES), batch_size))
    ids = torch.cat(
        [
            torch.randint(0, feature["num_embeddings"], (int(lengths.sum()),))
            for feature, lengths in zip(FEATURES, lengths_FB, strict=True)
        ]
    )
    return SparseIds(ids, len(FEATURES), lengths_FB, torch.rand(len(ids)) if has_weights else None)


def pooled_by_a_loop(tables, sparse):
    out = torch.zeros(sparse.batch_size, len(FEATURES), D, dtype=torch.float64)
    position = 0
    for f, feature in enumerate(FEATURES):
        weight = tables.state_dict()[f"{feature['name']}.weight"]
        for b in range(sparse.batch_size):
            length = int(sparse.lengths_FB[f, b])
            for _ in range(length):
                w = 1.0 if sparse.weights is None else sparse.weights[position].double()
                out[b, f] += w * weight[sparse.ids[position]]
                position += 1
            if feature.get("pooling") == "mean" and length:
                out[b, f] /= length
    return out


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_tables_pool_as_a_loop_does(seed, has_weights):
    torch.manual_seed(seed)
    tables, sparse = make_tables(), bags(has_weights=has_weights)
    assert (sparse.lengths_FB == 0).any()
    torch.testing.assert_close(tables(sparse), pooled_by_a_loop(tables, sparse), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("has_weights", [False, True])
def test_one_id_a_bag_needs_no_lengths(has_weights):
    torch.manual_seed(0)
    tables = make_tables()
    weights = torch.rand(15) if has_weights else None
    without = SparseIds(torch.randint(0, 5, (15,)), 3, None, weights)
    with_lengths = SparseIds(without.ids, 3, torch.ones(3, 5, dtype=torch.int64), weights)
    torch.testing.assert_close(tables(without), tables(with_lengths), rtol=1e-12, atol=1e-14)


def test_empty_bags_are_zeros_and_empty_batches_have_shape():
    tables = make_tables()
    none = SparseIds(torch.empty(0, dtype=torch.int64), 3, torch.zeros(3, 2, dtype=torch.int64))
    assert torch.equal(tables(none), torch.zeros(2, 3, D, dtype=torch.float64))
    assert tables(SparseIds(torch.empty(0, dtype=torch.int64), 3)).shape == (0, 3, D)
    empty = SparseIds(torch.empty(0, dtype=torch.int64), 3, torch.zeros(3, 0, dtype=torch.int64))
    assert tables(empty).shape == (0, 3, D)


def test_swapped_tables_are_caught():
    torch.manual_seed(0)
    features = [dict(feature, num_embeddings=7) for feature in FEATURES]
    tables, other = make_tables(features), make_tables([features[1], features[0], features[2]])
    sparse = SparseIds(torch.randint(0, 7, (12,)), 3)
    assert (tables(sparse) - other(sparse)).abs().max() > 1e-3


def test_embeddings_of_bfloat16_tables_are_float32():
    assert make_tables().to(torch.bfloat16)(SparseIds(torch.ones(3, dtype=torch.int64), 3)).dtype == torch.float32


def test_ids_of_another_number_of_features_are_refused():
    with pytest.raises(ValueError, match="ids for 2 features, but the model has 3"):
        make_tables()(SparseIds(torch.ones(4, dtype=torch.int64), 2))


def test_state_dict_keys_are_the_features_names():
    assert list(make_tables().state_dict()) == ["site.weight", "words.weight", "shops.weight"]


@pytest.mark.parametrize("std", [None, 0.3])
def test_any_cut_by_columns_starts_with_the_same_numbers(std):
    whole = init_table("site", 50, 12, range(12), seed=5, std=std)
    for cut in (range(4), range(4, 12), range(11, 12), range(0, 12, 3), range(0)):
        assert torch.equal(init_table("site", 50, 12, cut, seed=5, std=std), whole[:, list(cut)])


def test_initial_values_hang_on_seed_name_and_column_alone():
    torch.manual_seed(1)
    first = init_table("site", 50, 4, range(4), seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(init_table("site", 50, 4, range(4), seed=5), first)
    assert torch.equal(torch.get_rng_state(), before)
    for other in (init_table("shop", 50, 4, range(4), seed=5), init_table("site", 50, 4, range(4), seed=6)):
        assert not (other == first).any()
    assert not (first[:, 0] == first[:, 1]).any()


def test_initial_values_are_the_same_on_every_machine_and_day():
    """Seeds are hashed from names by a hash that, unlike Python's hash(), is the same in every process."""
    values = init_table("site", 2, 8, range(2, 4), seed=7)
    expected = torch.tensor([[-0.505399942, -0.096862055], [0.258241564, 0.689786792]])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_initial_values_have_the_promised_spread():
    uniform = init_table("site", 10_000, 4, range(4), seed=0)
    assert 0.00995 < uniform.abs().max() <= 0.01
    torch.testing.assert_close(uniform.std(), torch.tensor(0.01 / 3**0.5), rtol=0.02, atol=0)
    normal = init_table("site", 10_000, 4, range(4), seed=0, std=0.3)
    torch.testing.assert_close(normal.std(), torch.tensor(0.3), rtol=0.02, atol=0)


def test_columns_outside_the_table_are_refused():
    with pytest.raises(ValueError, match="columns 0 to 3"):
        init_table("site", 5, 4, range(2, 5), seed=0)


def test_dense_features_become_the_last_embeddings():
    torch.manual_seed(0)
    config = DhenConfig(
        embedding_dim=D, num_dense_features=3, num_dense_embeddings=2, dense_mlp=[5], sparse_features=FEATURES
    )
    features = FeatureProcessing(config).double()
    embeddings, dense = torch.randn(6, 3, D, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    first, _, last = features.dense_mlp
    by_hand = (dense @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
    x0 = features(embeddings, dense)
    assert x0.shape == (6, config.num_input_embeddings, D)
    assert torch.equal(x0[:, :3], embeddings)
    torch.testing.assert_close(x0[:, 3], by_hand[:, :D], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x0[:, 4], by_hand[:, D:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0], [1], []])
@pytest.mark.parametrize("kind", ["weighted bags", "bags", "one id each"])
def test_selected_features_pool_as_among_all(chosen, kind):
    sparse = SparseIds(torch.randint(0, 5, (18,)), 3) if kind == "one id each" else bags(has_weights="w" in kind)
    tables = make_tables()
    own = make_tables([FEATURES[feature] for feature in chosen])
    selected = sparse.select(chosen)
    assert selected.num_features == len(chosen)
    if chosen:
        torch.testing.assert_close(own(selected), tables(sparse)[:, chosen], rtol=0, atol=0)


def columns_drawn_at_once(rows: int, columns: range, std: float | None) -> torch.Tensor:
    """Each column as one call of its generator, which committed results were made with."""
    drawn = []
    for column in columns:
        digest = blake2b(f"3/{column}/site".encode(), digest_size=8).digest()
        generator, column = torch.Generator().manual_seed(int.from_bytes(digest, "little")), torch.empty(rows)
        bound = rows**-0.5
        if std is None:
            drawn.append(column.uniform_(-bound, bound, generator=generator))
        else:
            drawn.append(column.normal_(0.0, std, generator=generator))
    return torch.stack(drawn, dim=1)


@pytest.mark.parametrize("std", [None, 0.3])
def test_tables_drawn_in_parts_by_threads_are_those_drawn_at_once(monkeypatch, std):
    monkeypatch.setattr(features, "_NUMBERS_AT_ONCE", 6 * 64)
    for rows in (1, 15, 16, 17, 64, 79, 80, 81, 128 + 15, 300):
        ours, wanted = torch.empty(rows, 6, dtype=torch.float16), columns_drawn_at_once(rows, range(2, 8), std)
        assert torch.equal(init_table("site", rows, 8, range(2, 8), 3, std), wanted), rows
        assert torch.equal(draw_table(ours, "site", range(2, 8), 3, std, threads=4), wanted.half()), rows


def test_drawing_a_table_needs_no_copy_of_it():
    table = torch.empty(1 << 20, 16, dtype=torch.float16)
    with LiveMemory([table]) as memory:
        draw_table(table, "site", range(16), seed=3)
    assert memory.peak < 1.05 * 4 * features._NUMBERS_AT_ONCE < table.numel() * 4
