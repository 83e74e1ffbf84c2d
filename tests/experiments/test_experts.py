"""The generated data and the random backbone of the experiments on experts and on residues fit each other."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from experiments.experts import generated, small_llama
from proper.models.backbone import configured_backbone
from proper.models.targets import expert_targets


def test_the_random_backbone_has_the_layers_that_the_config_names(tmp_path: Path) -> None:
    given = Namespace(users=6, own_traits=0.0, epochs=1, rates=[1e-2, 0.2], backbone=None)
    config = generated(tmp_path / "data", 2, 0, given, small_llama(tmp_path / "backbone"))
    assert expert_targets(configured_backbone(config).model, config.groups)
