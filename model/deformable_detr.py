"""Deformable DETR: the deformable encoder, queries, decoder, heads."""

from torch import nn

from model.config import ModelConfig
from model.family.contrastive_denoising import ContrastiveDenoising
from model.family.look_forward_twice import LookForwardTwice
from model.family.mixed_selection import MixedQueries
from model.family.one_to_many import OneToMany
from model.heads import Heads
from model.multi_scale import MultiScaleDetector
from model.official_names import deformable_detr_names
from model.proposals import ProposalQueries
from model.queries import LearnedQueries
from model.transformer import DecoderLayer


class DeformableDETR(MultiScaleDetector):
    """Deformable DETR (section 4), with iterative refinement and two stages (A.4) by `config`.

    Numerically the published implementation.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.heads = (LookForwardTwice if config.look_forward_twice else Heads)(config)
        if config.two_stage:
            self.queries = (MixedQueries if config.mixed_query_selection else ProposalQueries)(
                config
            )
        else:
            self.queries = LearnedQueries(config)
        if config.one_to_many_queries:
            self.training_queries.append(OneToMany(config))
        if config.denoising_pairs:
            assert isinstance(self.queries, ProposalQueries)
            noised = ContrastiveDenoising(config, self.queries.position_of)
            self.training_queries.append(noised)

    def official_names(self, key: str) -> list[str]:
        return deformable_detr_names(key, self.config)
