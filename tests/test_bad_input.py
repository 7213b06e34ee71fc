"""Bad input: one line on stderr that says what and where, exit code 2, nothing on stdout."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from families import make_tiny

from streamer import cli, plan, run
from streamer.checkpoint import INDEX
from streamer.opened import open_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("whole") / "m", shards=2)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run.main(list(argv)) == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ((), "--prompt"),
        (("--prompt", ""), "empty"),
        (("--prompt", "x", "--chat"), "exclude"),
        (("--prompt", "x", "--temp", "nan"), "--temp"),
        (("--prompt", "x", "--temp", "-1"), "--temp"),
        (("--prompt", "x", "--top-p", "1.5"), "--top-p"),
        (("--prompt", "x", "--max-tokens", "0"), "--max-tokens"),
        (("--prompt", "x", "--max-tokens", "ten"), "--max-tokens"),
        (("--prompt", "x", "--memory", "nanGB"), "memory"),
        (("--prompt", "x", "--memory", "-1GB"), "memory"),
        (("--prompt", "x", "--memory", "0%"), "memory"),
        (("--prompt", "x", "--memory", "much"), "memory"),
        (("--prompt", "x", "--memory", "1MB"), "smallest budget"),
        (("--prompt", "x", "--io", "magic"), "--io"),
        (("--prompt", "x", "--context", "1"), "--context"),
        (("--prompt", "x", "--no-such-option"), "no-such-option"),
        (("--prompt", "x", "--kv-bits", "5"), "--kv-bits"),
        (("--prompt", "x", "--kv-bits", "2.50001"), "KV bits are auto or one of 16, 8"),
        (("--prompt", "x", "--kv-bits", "4", "--memory", "1MB"), "tokens at 4 bits"),
        (("--prompt", "x", "--memory", "1MB"), "tokens at 2 bits"),
    ],
)
def test_options(
    whole: Path, argv: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in refused(capsys, "--model", str(whole), *argv)


def change(**values: object) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config.update(values)
        (model / "config.json").write_text(json.dumps(config))

    return apply


def truncate(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[-1]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 100)


def lie(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    blob = shard.read_bytes()
    shard.write_bytes(blob.replace(b'"shape":[', b'"shape":[9', 1))


def lose_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[0].unlink()


def lose_shard_and_index(model: Path) -> None:
    lose_shard(model)
    (model / INDEX).unlink(missing_ok=True)


def lose_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        (model / name).write_bytes(data)

    return apply


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "cut off"),
        (lie, "header"),
        (lose_shard, "missing"),
        (lose_shard_and_index, "does not load"),
        (lose_tokenizer, "tokenizer"),
        (change(model_type="no_such_model"), "no_such_model"),
        (change(model_type="llama"), "does not load"),
        (change(num_hidden_layers="three"), "does not load"),
        (change(num_hidden_layers=-1), "does not load"),
        (change(hidden_size=1 << 40), "does not load"),
        (change(num_experts=1000), "does not load"),
        (change(vocab_size=None), "does not load"),
        (change(quantization={"bits": 77}), "does not load"),
        (
            change(num_hidden_layers=10**20),
            "num_hidden_layers is 10000",
        ),
        (change(text_config={"num_experts": 1e30}), "num_experts is 1e+30"),
        (change(num_experts_per_tok=0), "num_experts_per_tok is 0"),
        (change(text_config={"num_experts_per_tok": -1}), "num_experts_per_tok is -1"),
        (change(quantization=None, quantization_config={"bits": 4}), "there is no 'quant_method'"),
        (change(eos_token_id="</s>"), "config.json: eos_token_id"),
        (write("generation_config.json", b"[]"), "generation_config.json is not a JSON object"),
        (write("generation_config.json", b"\xff"), "generation_config.json is not valid JSON"),
        (write("tokenizer_config.json", b"{"), "tokenizer_config.json is not valid JSON"),
        (write("tokenizer.json", b"{"), "no usable tokenizer"),
    ],
)
def test_damage(
    model: Path,
    damage: Callable[[Path], None],
    what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(model)
    message = refused(capsys, "--model", str(model), "--prompt", "x")
    assert what in message or (what == "header" and "model" in message)
    assert plan.main(["--model", str(model)]) == 2


def test_a_chat_template_that_fails(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{% if", "{{ raise_exception('no roles') }}", "{{ messages[7].content }}"):
        (model / "chat_template.jinja").write_text(text)
        assert "chat template fails" in refused(capsys, "--model", str(model), "--prompt", "x")
    assert run.main(["--model", str(model), "--prompt", "x", "--raw", "--max-tokens", "1"]) == 0


@pytest.mark.parametrize("name", ["a[1]b", "[x]", "*", "[[]", "a?b", "it's a {name}"])
def test_names_of_folders(
    whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "axb")  # which `*` and `a?b` would find too
    model = shutil.copytree(whole, tmp_path / name)
    argv = ["--prompt", "x", "--raw", "--max-tokens", "2", "--mtp", "off"]
    assert run.main(["--model", str(whole), *argv]) == 0
    expected = capsys.readouterr().out
    assert run.main(["--model", str(model), *argv]) == 0
    out, err = capsys.readouterr()
    assert out == expected and err.startswith(f"{name}: budget ")


def test_the_command_that_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It works when it is pasted, whatever the folder is called."""
    hub = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    for path, where in ((tmp_path / "a [1]'b", tmp_path), (hub, None)):
        make_tiny("llama4", path, layout="hf")
        message = refused(capsys, "--model", str(path), "--prompt", "x")
        command = shlex.split(message.rpartition("convert it once: ")[2])
        assert command[:4] == ["python", "-m", "streamer.convert", str(path)]
        assert Path(command[4]).parent == (where or Path())
        assert Path(command[4]).name == f"{'name' if where is None else path.name}-streamable"


def test_the_name_of_a_repository(whole: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(whole, hub)
    assert open_model(hub).name == "name"


def test_a_process_of_its_own(model: Path) -> None:
    truncate(model)
    command = [sys.executable, "-m", "streamer.run", "--model", str(model), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "cut off" in done.stderr


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that fits just runs, one that does not is refused."""
    dense = make_tiny("qwen3_moe", tmp_path / "dense", changes={"mlp_only_layers": [0, 1, 2, 3]})
    assert run.main(["--model", str(dense), "--prompt", "x", "--raw", "--max-tokens", "3"]) == 0
    assert "a dense model" in capsys.readouterr().err
    assert "smallest budget" in refused(
        capsys, "--model", str(dense), "--prompt", "x", "--memory", "1MB"
    )


def test_statistics_that_cannot_be_written(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model", str(whole), "--prompt", "x", "--raw", "--max-tokens", "2"]
    assert run.main([*argv, "--stats", "/no/such/folder/s.json"]) == 2
    told = capsys.readouterr()
    assert "cannot write" in told.err and not told.out, "before the model is loaded"
    assert len(told.err.splitlines()) == 1


def test_a_prompt_that_is_not_utf8(whole: Path) -> None:
    command = [sys.executable, "-m", "streamer.run", "--model", str(whole), "--prompt", "-"]
    for environment in ({"LC_ALL": "C", "PYTHONUTF8": "1"}, {"PYTHONIOENCODING": "utf-8:strict"}):
        done = subprocess.run(
            command, input=b"\xff\xfe", capture_output=True, env=os.environ | environment
        )
        assert done.returncode == 2 and done.stdout == b""
        assert done.stderr == b"error: the prompt is not UTF-8\n"


def test_an_interruption_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", stop)
    assert cli.main(["run", "--prompt", "x"]) == 130
