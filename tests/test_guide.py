"""The guide says what is true: its code runs, and so do the commands for one's own work, at the smoke budget."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab import cli, data

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN = TEXT.partition("## Your own work")[2].partition("\n## ")[0]
COMMANDS, OF_README = (
    [line.partition("  #")[0].strip() for line in re.findall(r"^trimtab .*", text, re.MULTILINE)]
    for text in (TEXT, README)
)


def test_the_loop_runs():
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code
    with torch.random.fork_rng():
        exec(code[1], {})


@pytest.mark.parametrize("command", [line for line in COMMANDS if line in OWN])
def test_a_command_for_ones_own_work_runs(command, tmp_path, monkeypatch, capsys):
    code = re.search(r'```python title="my_module.py"\n(.*?)```', OWN, re.DOTALL)
    assert code
    (tmp_path / "my_module.py").write_text(code[1], encoding="utf-8")
    digits = data.load("digits")
    np.savez(tmp_path / "mine.npz", x=digits.x_train[:200].numpy(), y=digits.y_train[:200].numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    few = [] if "--methods" in command or "--combine" in command else ["--methods", "elr"]
    options = ["--budget", "smoke", "--jobs", "1", "--store", "runs.sqlite"]
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), *few, *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    assert "surely behind" in out


def test_every_command_and_option_exists():
    import typer

    known = typer.main.get_command(cli.app)
    for command in [*COMMANDS, *OF_README]:
        words = shlex.split(command)[1:]
        options = {name for parameter in known.commands[words[0]].params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, command
