"""A model that has heads of both roles, and a task on which they are confirmed."""

import pytest

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.synthetic.planted import PlantedModel, plant
from headtune.analysis.synthetic.planting import Planting
from headtune.analysis.tasks.task import Task


@pytest.fixture(scope="package")
def planted() -> PlantedModel:
    """Three layers of eight heads, three of which recall and three of which suppress."""
    return plant(Planting("small", n_layers=3, d_model=64))


@pytest.fixture(scope="package")
def lists(planted: PlantedModel) -> HeadModel:
    return planted.view()


@pytest.fixture(scope="package")
def towns(planted: PlantedModel) -> Task:
    """Eight subjects, one prompt each."""
    return planted.task.limited(8)
