"""The signature of ``ShortlistLogits``."""

from __future__ import annotations

from shadowllm.plugins.schema import OpSchema, Port

SHORTLIST_LOGITS = OpSchema(
    name="ShortlistLogits",
    inputs=(
        Port("x", ("R", "D")),
        Port("table", ("V", "D")),
        Port("copy", ("V", "copy_blocks", "copy_bytes"), "uint8"),
        Port("scales", ("V", "copy_blocks"), "float32"),
        Port("errors", ("V",), "float32"),
        Port("shortlist", (), "int32"),
        Port("certify", (), "int32"),
        Port("weighting", ("D",), "float32", optional=True),
        Port("table_scales", ("V", "blocks"), "float32", optional=True),
    ),
    outputs=(Port("logits", ("R", "V"), "float32"), Port("recomputed", ("R",), "int32")),
    attributes=(),
    doc="For each row of x, its products with all rows of the table. They come from a 4-bit copy of the table, but the "
    "shortlist rows with the largest of them (ties go to the lower index) are recomputed from the table itself. If "
    "certify is not 0, the shortlist has at least one row, and every other row v is recomputed for which its product "
    "from the copy + errors[v] * |weighting * x| is not below the largest product of the shortlist. So the largest "
    "logit is proved to be that of the whole table. The errors are made by `certificate.copy_errors`; without a "
    "weighting, it is 1. recomputed counts the rows that were recomputed for each row of x. A shortlist of V or more "
    "takes all rows. Each row of x may have its own shortlist and certify, (R,). With table_scales, the "
    "table is one of integers. A table of integers without them is the residual of nested integers, whose other part "
    "is the copy.",
)
