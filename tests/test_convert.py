import shlex

import pytest
import torch

from wemoe_fast import CheckpointError
from wemoe_fast.checkpoint import load_pretrained
from wemoe_fast.cli import main
from wemoe_fast.convert import convert

transformers = pytest.importorskip("transformers")


@pytest.fixture
def pickled(tmp_path):
    """A model as it was saved before safetensors, with a head, in a directory whose name has to be quoted."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=40))
    directory = tmp_path / "it's a model"
    model.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    (directory / "vocab.txt").write_text("words")
    return directory, model


def same(directory, model):
    twin = load_pretrained(directory).state_dict()
    return all(torch.equal(tensor, twin[name]) for name, tensor in model.state_dict().items())


def test_the_command_in_the_message_converts_a_checkpoint_that_was_refused(pickled, capsys):
    directory, model = pickled
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load_pretrained(directory)
    command = shlex.split(str(caught.value).partition("running any: ")[2])
    assert command[0] == "wemoe-fast"
    assert main(command[1:]) == 0
    assert "pytorch_model.bin" in capsys.readouterr().out
    assert same(command[-1], model)
    assert (directory.with_name("it's a model-safetensors") / "vocab.txt").read_text() == "words"
    assert main(command[1:]) == 1, "nothing is overwritten"


def test_shards_old_files_and_checkpoints_of_training_are_read(pickled, tmp_path):
    directory, model = pickled
    state = list(model.state_dict().items())
    torch.save(dict(state[:5]), directory / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(state[5:]), directory / "pytorch_model-00002-of-00002.bin", _use_new_zipfile_serialization=False)
    (directory / "training_args.bin").write_bytes(b"x")
    assert len(convert(directory, tmp_path / "a", max_shard_bytes=4000)) == 2
    assert same(tmp_path / "a", model)
    for path in directory.glob("*.bin"):
        path.unlink()
    torch.save({"epoch": 3, "state_dict": dict(state)}, directory / "best.ckpt")
    convert(directory, tmp_path / "b")
    assert same(tmp_path / "b", model)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(pickled, tmp_path):
    directory, _ = pickled
    (directory / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/hacked'\ntR.".encode())
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read without running code"):
        convert(directory, tmp_path / "out")
    assert not (tmp_path / "hacked").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [[1], {}, {"a": 1}, {1: torch.zeros(1)}, {"a": torch.zeros(1), "b": None}])
def test_what_holds_no_named_tensors_is_refused(pickled, tmp_path, content):
    torch.save(content, pickled[0] / "model.pt")
    with pytest.raises(CheckpointError, match="named tensors"):
        convert(pickled[0], tmp_path / "out")


def test_there_must_be_one_thing_to_convert(pickled, tmp_path):
    directory, model = pickled
    with pytest.raises(CheckpointError, match="found none"):
        convert(directory, tmp_path / "out")
    for name in ("a.pt", "b.pt"):
        torch.save(model.state_dict(), directory / name)
    with pytest.raises(CheckpointError, match=r"a.pt, b.pt"):
        convert(directory, tmp_path / "out")
    (directory / "b.pt").unlink()
    with pytest.raises(CheckpointError, match="apart"):
        convert(directory, directory, overwrite=True)
