"""The signature of ``SelectTopK``."""

from __future__ import annotations

from shadowllm.plugins.schema import Attribute, OpSchema, Port

SELECT_TOPK = OpSchema(
    name="SelectTopK",
    inputs=(Port("scores", ("R", "N"), "float32"), Port("counts", ("R",), "int32")),
    outputs=(Port("indices", ("R", "cap"), "int32"),),
    attributes=(Attribute("cap", int),),
    doc="Ascending indices of the counts[r] largest scores of each row; of equal scores, the lower index wins.",
)
