"""transformers' model tests on a small DBRX, for the classes that `variants.py` has put into transformers.

`run.py` runs this file with pytest in the unpacked sdist, whose folder `tests` is transformers' own. An sdist has no test file of DBRX
itself: this one gives the mixin of all models a configuration of DBRX's kind. A checkout has one, which `run.py` runs instead.
"""

from __future__ import annotations

import os
import unittest

import torch
import transformers
from tests.test_configuration_common import ConfigTester  # transformers' folder, not this project's
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor

__all__ = ["DbrxModelTest", "DbrxModelTester"]


class DbrxModelTester:
    """The sizes, the configuration and the inputs that the mixin asks for, under the names that it asks for."""

    batch_size, seq_length, vocab_size = 13, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads = 32, 2, 2, 2
    is_training = True

    def get_config(self) -> transformers.DbrxConfig:
        """A DBRX of two layers with eight experts. The RoPE theta is the one that transformers computes with, whatever it is given."""
        return transformers.DbrxConfig(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            max_seq_len=512,
            attn_config={"clip_qkv": 8, "kv_n_heads": self.num_key_value_heads, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 4, "moe_loss_weight": 0.05, "moe_jitter_eps": 0},
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.DbrxConfig, dict[str, torch.Tensor]]:
        """The configuration and a padded batch: sequence i has i + 1 tokens."""
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class DbrxModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """All tests of the mixin, and those of a configuration."""

    all_model_classes = tuple(getattr(transformers, name) for name in os.environ["DBRX_PEERS_CLASSES"].split())

    def setUp(self) -> None:
        self.model_tester = DbrxModelTester()
        self.config_tester = ConfigTester(self, config_class=transformers.DbrxConfig, d_model=37)

    def test_config(self) -> None:
        """A configuration survives JSON and saving."""
        self.config_tester.run_common_tests()
