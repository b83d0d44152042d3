"""What looks wrong with a data set's labels: one line each, with the numbers and the remedy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """`kind`: a short name, as in docs/own_data.md; `evidence`: what was seen, in numbers;
    `surely_wrong`: whether nothing good can come of a training on such labels."""

    kind: str
    evidence: str
    remedy: str
    surely_wrong: bool = False

    def __str__(self) -> str:
        return f"label check: {self.kind}: {self.evidence}; {self.remedy}"
