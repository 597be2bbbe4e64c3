"""Makes a full exported model of a base model and the deltas of the runs that trained it further.

    python tools/apply_deltas.py runs/monday runs/tuesday/delta runs/wednesday/delta --output models/wednesday

The base is a run folder or an exported model. Deltas come in the order of their runs, each made by `recipes/train.py`
with `--model_name_or_path`, of the model before, and `--write_delta true`. The result equals the last run's exported
model to the bit. A wrong base, a wrong order or a damaged file is refused.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a call by path finds the package

from dhen.training.saved.deltas import apply_deltas
from dhen.training.saved.trained_model import TrainedModel


def main() -> int:
    """Exit status: 0, or 1 with a message on stderr."""
    arguments = parse_arguments()
    output = arguments.output
    try:
        if output.exists():
            raise ValueError(f"{output}: this folder exists. Remove it or choose another name.")
        apply_deltas(TrainedModel.open(arguments.base), arguments.deltas, output)
    except (ValueError, OSError) as error:
        print(f"apply_deltas: {error}", file=sys.stderr)
        return 1
    print(f"{output}: the model of {arguments.deltas[-1]}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="run folder or exported model that the first delta was made from")
    parser.add_argument("deltas", nargs="+", type=Path, metavar="delta", help="delta folders, in their order")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of the full model")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
