"""One small checkpoint a family: real classes, real tile geometry, tiny hidden sizes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

from actors.families import Family, load_family


@dataclass(frozen=True)
class Subject:
    """A family beside its oracles."""

    family: Family
    processor: ProcessorMixin
    model: PreTrainedModel
    path: str


@pytest.fixture(scope="session")
def llava_onevision(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tests.actors.families import small

    return subject(tmp_path_factory.mktemp("llava_onevision"), *small.llava_onevision())


@pytest.fixture(scope="session")
def aya_vision(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tests.actors.families import small

    return subject(tmp_path_factory.mktemp("aya_vision"), *small.aya_vision())


@pytest.fixture(scope="session")
def aria(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tests.actors.families import small_aria

    return subject(tmp_path_factory.mktemp("aria"), *small_aria.aria())


@pytest.fixture(scope="session")
def fuyu(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    from tests.actors.families import small_fuyu

    return subject(tmp_path_factory.mktemp("fuyu"), *small_fuyu.fuyu())


def subject(folder: Path, model_class, config, processor) -> Subject:
    """A checkpoint written to `folder`, loaded as a family; random weights, the same each time."""
    from tests.actors.families.oracle import write_checkpoint

    path = write_checkpoint(folder, config, processor)
    torch.manual_seed(0)
    return Subject(load_family(path), processor, model_class(config).eval(), path)
