"""A few networks of the zoo, in every column; `make zoo` tries them all and writes docs/compatibility.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zoo
import zoo_columns
from zoo_networks import Network, networks

RESULTS = json.loads(zoo.RESULTS.read_text())
FEW = {
    "timm/mobilenetv3_small_050",
    "timm/beit_base_patch16_224",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/SwinTransformer",
    "transformers/BertForSequenceClassification",
    "transformers/GPT2LMHeadModel",
    "torch/TransformerEncoder",
    "torch/LSTM",
}
NETWORKS = [network for network in networks() if network.name in FEW]


def test_all_of_them_have_a_row() -> None:
    assert set(RESULTS["networks"]) == {network.name for network in networks()}
    assert len(NETWORKS) == len(FEW)


def test_no_answer_is_wrong() -> None:
    wrong = [
        (name, column)
        for name, row in RESULTS["networks"].items()
        for column, cell in row.items()
        if cell["status"] == "wrong"
    ]
    assert not wrong


@pytest.mark.parametrize("column", zoo_columns.COLUMNS)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
@pytest.mark.filterwarnings("ignore")
def test_the_answer_is_the_recorded_one(network: Network, column: str) -> None:
    cell = zoo_columns.tried(zoo_columns.COLUMNS[column], network)
    assert cell.status == RESULTS["networks"][network.name][column]["status"], cell.detail


@pytest.mark.filterwarnings("ignore")
def test_a_saved_network_is_loaded(tmp_path: Path) -> None:
    network = NETWORKS[0]
    zoo_columns.save(network, tmp_path / "saved.pt")
    assert zoo_columns.load(network, tmp_path / "saved.pt").status == "exact"


def test_the_page_is_the_results() -> None:
    """If not: python tests/zoo/zoo.py --page."""
    assert zoo.PAGE.read_text() == zoo.page(RESULTS)
