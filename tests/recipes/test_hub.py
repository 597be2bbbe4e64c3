"""A model goes to the Hugging Face hub and comes back: against a server of this test that speaks the hub's HTTP API."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dhen.pipeline import DhenPipeline
from tests.recipes.launch import ROOT, TINY, run_script

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, whose files a commit brings."""

    files: dict[str, bytes]
    calls: list[str]

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.calls.append(self.path)
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/clicks"})
        elif "/preupload/" in self.path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in wanted]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines if line["key"] == "file"
            }  # fmt: skip
            self.answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/me/clicks/commit/{COMMIT}",
                }
            )
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.calls.append(self.path)
        if self.path.startswith("/api/models/me/clicks/tree/"):
            listed = {name: (len(data), hashlib.sha1(data).hexdigest()) for name, data in self.files.items()}
            self.answer([{"type": "file", "path": name, "size": of[0], "oid": of[1]} for name, of in listed.items()])
            return
        if self.path.startswith("/api/models/me/clicks"):
            files = [{"rfilename": name} for name in self.files]
            self.answer({"id": "me/clicks", "sha": COMMIT, "siblings": files, "private": False, "tags": []})
            return
        data = self.files.get(self.path.partition(f"/resolve/{COMMIT}/")[2])
        if data is None:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.files, Hub.calls = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


CODE = """
import sys
import polars as pl
from dhen.pipeline import DhenPipeline
print(DhenPipeline.from_pretrained(sys.argv[1]).push_to_hub("me/clicks", token="hf_x"))
scores = DhenPipeline.from_pretrained("me/clicks").predict(pl.read_csv(sys.argv[2]))
pl.DataFrame({"score": scores}).write_parquet(sys.argv[3])
try:
    DhenPipeline.from_pretrained("me/nothing")
except Exception as error:
    print(type(error).__name__)
"""


def test_a_model_goes_to_the_hub_and_comes_back(hub, tmp_path):
    rows = pl.DataFrame({"label": [0, 1] * 30, "user": ["ä", "b", "c"] * 20, "price": [1.5, None] * 30})
    rows.write_csv(tmp_path / "rows.csv")
    (tmp_path / "schema.yaml").write_text("dense: [price]\nsparse: [{name: user, encoding: vocabulary}]\n")
    data = (f"--dataset_name={tmp_path / 'rows.csv'}", f"--dataset_schema={tmp_path / 'schema.yaml'}")
    done = run_script("train.py", *TINY, *data, f"--output_dir={tmp_path / 'run'}", "--max_steps=2")
    assert done.status == 0, done.output
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    words = [str(tmp_path / name) for name in ("run", "rows.csv", "scores.parquet")]
    done = subprocess.run([sys.executable, "-c", CODE, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{address}/me/clicks", "FileNotFoundError"]
    model = tmp_path / "run" / "model"
    assert Hub.files == {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    expected = DhenPipeline.from_pretrained(model).predict(rows)
    np.testing.assert_array_equal(pl.read_parquet(tmp_path / "scores.parquet")["score"], expected)
    assert Path(words[0]).is_dir()
