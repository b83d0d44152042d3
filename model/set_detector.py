"""The main path of every detector by queries: encode, ask, decode, predict.

N batch, Q queries, S tokens, C model width.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.parts import Group, Memory, Outputs, Prediction, Queries, Targets
from model.queries import Formulation


class SetDetector(nn.Module, ABC):
    """A member of the DETR family: an encoder, and a choice of three parts.

    A subclass sets them. `queries`, the formulation: `forward(memory, heads) -> Queries`, and
    `at(layer, queries, content, references)`, the position that this layer is given. `decoder`, its
    layers: each `forward(content, position, references, memory, mask) -> content`. `heads`, with
    the refinement rule: `forward(layer, content, references) -> (Prediction, References)`, the
    references of the next layer. `training_queries`, each `forward(queries, memory, targets) ->
    Queries`, add groups that only training pays for.

    Every parameter that requires a gradient gets one in every step, also from a batch without
    boxes.
    """

    queries: Formulation
    decoder: nn.ModuleList
    heads: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.training_queries = nn.ModuleList()

    @abstractmethod
    def encode(self, images: Tensor, padding_mask: Tensor) -> Memory:
        """Images and mask as `forward` has them."""

    @abstractmethod
    def official_names(self, key: str) -> list[str]:
        """The published name of one of our keys, and the others the same tensor has there."""

    def forward(
        self, images: Tensor, padding_mask: Tensor, targets: Targets | None = None
    ) -> Outputs:
        """Detect objects in a padded batch.

        images [N, 3, H, W]; padding_mask [N, H, W] bool, True on padding, which must leave the
        top left pixel of each image valid; targets where `config.wants_targets`, in training.
        Returns `pred_logits` [N, Q, classes], `pred_boxes` [N, Q, 4] as (cx, cy, w, h) normalised
        by each image's valid area, `aux_outputs` (the same two for each earlier decoder layer) if
        the loss wants them, in two-stage `enc_outputs` (the same two for all S tokens), and
        `classification` where the last column is no object. In training
        `groups` has the first three and a `group` for each one of queries of training alone. Boxes
        are float32 at the least, logits as computed.
        """
        memory = self.encode(images, padding_mask)
        queries = self.queries(memory, self.heads)
        if self.training:
            for group in self.training_queries:
                queries = group(queries, memory, targets)
        predictions = self.decode(queries, memory)
        outputs, groups = self._divided(predictions, queries.groups)
        if queries.first_stage:
            outputs["enc_outputs"] = queries.first_stage
        if self.config.classification != "focal":
            outputs["classification"] = self.config.classification
        if groups:
            outputs["groups"] = groups
        return outputs

    def decode(self, queries: Queries, memory: Memory) -> list[Prediction]:
        """Each decoder layer's prediction of all queries."""
        content, references = queries.content, queries.references
        predictions = []
        for index, layer in enumerate(self.decoder):
            position = self.queries.at(index, queries, content, references)
            content = self._run(layer, content, position, references, memory, queries.mask)
            prediction, references = self.heads(index, content, references)
            predictions.append(prediction)
        return predictions

    def _divided(
        self, predictions: list[Prediction], groups: tuple[Group, ...]
    ) -> tuple[Outputs, list[Outputs]]:
        """Of the queries that detect, and of each group."""
        if not groups:
            return self._outputs(predictions), []
        first = predictions[0][0].shape[1] - sum(group.queries for group in groups)
        counts = [first, *(group.queries for group in groups)]
        split = [(x.split(counts, 1), y.split(counts, 1)) for x, y in predictions]
        detecting, *others = (
            self._outputs([(x[part], y[part]) for x, y in split]) for part in range(len(counts))
        )
        return detecting, [
            {**outputs, "group": group} for outputs, group in zip(others, groups, strict=True)
        ]

    def _outputs(self, predictions: list[Prediction]) -> Outputs:
        layers: list[Outputs] = [{"pred_logits": x, "pred_boxes": y} for x, y in predictions]
        outputs = layers.pop()
        if self.config.auxiliary_loss:
            outputs["aux_outputs"] = layers
        return outputs

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)
