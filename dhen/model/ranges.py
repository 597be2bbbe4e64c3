"""The numbers that arguments and options may be, as types that pydantic checks. NaN and infinity are in no range.

The upper bounds are far above sensible values. They keep counts and sizes indexable, and squares within float32.
"""

from typing import Annotated, Any

from annotated_types import Interval
from pydantic import (
    BeforeValidator,
    FiniteFloat,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

_NUMBER = BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)
"""Refuses true, which pydantic takes for 1."""


def _rows_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError(f"{value!r:.80} is not allowed. Use a whole number from 2 to 2^40, or auto.") from error


Size = Annotated[int, Interval(ge=1, le=2**20), _NUMBER]
"""Size of a layer or of a group: embeddings, units, channels, ranks."""
SizeFrom0 = Annotated[int, Interval(ge=0, le=2**20), _NUMBER]
Depth = Annotated[int, Interval(ge=1, le=10_000), _NUMBER]
"""Number of layers."""
DepthFrom0 = Annotated[int, Interval(ge=0, le=10_000), _NUMBER]
Rows = Annotated[int, Interval(ge=1, le=2**40), _NUMBER]
"""Rows of a table. With more than 2**31 rows, ids are int64."""
HashRows = Annotated[int, Interval(ge=2, le=2**40), _NUMBER]
"""Row 0 is for blanks."""
HashSize = Annotated[HashRows, WrapValidator(_rows_or_auto)] | Annotated[str, StringConstraints(pattern="^auto$")]
"""auto: by the number of distinct keys."""
Bins = Annotated[int, Interval(ge=2, le=10_000), _NUMBER]
Batch = Annotated[int, Interval(ge=1, le=2**24), _NUMBER]
"""Examples in a batch: with 128 features of one id each, these are 2**31 ids."""
Count = Annotated[int, Interval(ge=1, le=10**12), _NUMBER]
CountFrom0 = Annotated[int, Interval(ge=0, le=10**12), _NUMBER]
MaxSteps = Annotated[int, Interval(ge=-1, le=10**12), _NUMBER]
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1), _NUMBER]
"""32 bits, as NumPy's seeds have; torch gets the rank on top."""
Positive = Annotated[FiniteFloat, Interval(gt=0, le=1e30), _NUMBER]
Epsilon = Annotated[FiniteFloat, Interval(ge=1e-30, le=1e18), _NUMBER]
"""Above 0 in float32 too: without one, a weight whose gradient is 0 becomes NaN."""
NotNegative = Annotated[FiniteFloat, Interval(ge=0, le=1e18), _NUMBER]
FromOne = Annotated[FiniteFloat, Interval(ge=1, le=1e18), _NUMBER]
Share = Annotated[FiniteFloat, Interval(ge=0, le=1), _NUMBER]
ShareBelowOne = Annotated[FiniteFloat, Interval(ge=0, lt=1), _NUMBER]
ShareBetween = Annotated[FiniteFloat, Interval(gt=0, lt=1), _NUMBER]
ShareAbove0 = Annotated[FiniteFloat, Interval(gt=0, le=1), _NUMBER]
