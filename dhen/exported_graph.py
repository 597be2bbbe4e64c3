"""An exported graph (ONNX or AOTInductor), which computes probabilities without the model's Python code."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dhen.exported_index import COPY_AGAIN
from dhen.model.features import SparseIds
from dhen.model.scoring_graph import graph_inputs

GRAPH_FILES = {"onnx": "model.onnx", "aot": "model.pt2"}
"""By format."""
PIP_ONNX = "pip install onnx onnxscript onnxruntime"


class ExportedGraph:
    """Called with the ids and the dense features of a batch, it returns probabilities (B, 1 + T)."""

    def __init__(self, file: Path) -> None:
        """Load it. Raises ValueError if it is damaged, or if onnxruntime is needed and missing."""
        self._session = None
        try:
            if file.name == GRAPH_FILES["aot"]:
                self._package = torch._inductor.aoti_load_package(str(file))
            else:
                self._session = _onnx_session(file)
        except ImportError as error:
            raise ValueError(f"{file}: onnxruntime is not installed. Run `pip install onnxruntime`.") from error
        except Exception as error:  # of any kind, by what loads it
            reason = str(error).strip().partition("\n")[0]
            is_aot = file.name == GRAPH_FILES["aot"]
            way_out = COPY_AGAIN + " Use the version of torch and the kind of CPU that compiled it." * is_aot
            raise ValueError(f"{file}: cannot be loaded ({reason:.300}). {way_out}") from error

    def __call__(self, sparse: SparseIds | None, dense_BN: Tensor) -> Tensor:
        """Return probabilities (B, 1 + T)."""
        return self.run(graph_inputs(sparse, dense_BN))

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """As a call, with the inputs by name."""
        if self._session is None:
            return self._package(**inputs)
        (probabilities,) = self._session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(probabilities)


def _onnx_session(file: Path) -> Any:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return InferenceSession(str(file), options)
