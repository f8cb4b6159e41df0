"""The notebook runs from top to bottom, as it is committed but for its settings."""

import os

import nbformat
import pytest
from conftest import PROJECT
from nbclient import NotebookClient

NOTEBOOK = PROJECT / "notebooks" / "ask_a_tweet.ipynb"


def printed(cell):
    """What a cell printed or showed as text."""
    texts = [out["text"] if out["output_type"] == "stream" else out["data"]["text/plain"] for out in cell.outputs]
    return "".join(texts)


@pytest.fixture(scope="module")
def executed(finished_runs, standin, tmp_path_factory):
    """The notebook after a run on stand-in folders, started where a user would: in notebooks/."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.startswith("# Settings")]
    assert len(settings) == 1 and settings[0] is notebook.cells[1]
    folders = {"FULL": finished_runs / "full", "LORA": finished_runs / "lora", "BASE": standin}
    folders["COMPARISON"] = tmp_path_factory.mktemp("comparison") / "out"
    for name, folder in folders.items():
        assert f"\n{name} = " in settings[0].source
        settings[0].source += f"\n{name} = {str(folder)!r}"
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return notebook, folders


def test_the_notebook_runs_from_top_to_bottom(executed):
    notebook, folders = executed
    cells = {cell.source.split("\n")[0]: cell for cell in notebook.cells if cell.cell_type == "code"}
    for cell in cells.values():
        assert not any(out.get("name") == "stderr" for out in cell.outputs), cell.outputs
    asked = printed(cells['tweet = "The Rockets won again! What a night. #nba"'])
    assert [line.split(":")[0] for line in asked.splitlines()] == ["full fine-tuning", "LoRA"]
    batch = printed(cells["batch = pd.DataFrame("])
    assert all(name in batch for name in ("full answer", "full score", "LoRA answer", "LoRA score", "where does"))
    images = [out for cell in cells.values() for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(images) == 3  # two loss curves and the comparison
    assert (folders["COMPARISON"] / "comparison.md").is_file()
    assert "F1 per MB of checkpoint" in printed(notebook.cells[-1])


def test_the_notebook_answers_as_the_helper_does(executed):
    from helper_functions import answer, load_model_and_tokenizer

    notebook, folders = executed
    model, tokenizer = load_model_and_tokenizer(str(folders["FULL"]))
    expected = answer(model, tokenizer, "cpu", "who won?", "The Rockets won again! What a night. #nba")
    [cell] = [cell for cell in notebook.cells if cell.source.startswith("tweet = ")]
    assert printed(cell).startswith(f"full fine-tuning: {expected}\n")


def test_the_notebook_is_committed_small_and_without_outputs():
    assert os.path.getsize(NOTEBOOK) < 100_000
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
