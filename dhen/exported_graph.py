"""An exported graph (ONNX or AOTInductor), which computes probabilities without the model's Python code."""

from pathlib import Path

import torch
from torch import Tensor

from dhen.model.features import SparseIds
from dhen.model.scoring_graph import graph_inputs

GRAPH_FILES = {"onnx": "model.onnx", "aot": "model.pt2"}
"""By format."""
PIP_ONNX = "pip install onnx onnxscript onnxruntime"


class ExportedGraph:
    """Called with the ids and the dense features of a batch, it returns probabilities (B, 1 + T)."""

    def __init__(self, file: Path) -> None:
        """Load it. Raises ValueError if onnxruntime is needed and missing."""
        if file.name == GRAPH_FILES["aot"]:
            self._package, self._session = torch._inductor.aoti_load_package(str(file)), None
            return
        try:
            from onnxruntime import InferenceSession, SessionOptions
        except ImportError as error:
            raise ValueError(f"{file}: onnxruntime is not installed. Run `{PIP_ONNX}`.") from error
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = InferenceSession(str(file), options)

    def __call__(self, sparse: SparseIds | None, dense_BN: Tensor) -> Tensor:
        """Return probabilities (B, 1 + T)."""
        return self.run(graph_inputs(sparse, dense_BN))

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """As a call, with the inputs by name."""
        if self._session is None:
            return self._package(**inputs)
        (probabilities,) = self._session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(probabilities)
