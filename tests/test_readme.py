"""What the readme says to paste works when pasted, and links between pages lead somewhere."""

import json
import re
import shlex

import numpy as np
import pytest
from commands import lowrank
from torchvision.models import resnet18

from lowrank_helpers import PROJECT, compression, rank

SECTION = re.search(r"^## Your own network$(.*?)^## ", (PROJECT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", SECTION[1], re.DOTALL))


def test_links_between_pages_lead_somewhere():
    for page in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]:
        links = [link for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
        assert all((page.parent / link).exists() for link in links), page


@pytest.mark.slow
def test_the_commands_for_your_own_network_measure_a_resnet_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {"python": lambda flag, code: exec(code, {}) or "", "lowrank": lowrank}
    lines = [shlex.split(line, comments=True) for line in BLOCKS["sh"].splitlines()]
    output = "".join(run[program](*arguments) for program, *arguments in lines)
    assert len(re.findall(r"^layer4\.1\.conv2 +512×512·3·3 +512/512 ", output, re.MULTILINE)) == 3
    folder, model = tmp_path / "reports" / "resnet18", resnet18()
    assert {file.name for file in folder.iterdir()} == {"index.html", "results.json"}
    results = json.loads((folder / "results.json").read_text())
    matrices = results["matrices"]
    assert list(matrices) == list(rank.weight_matrices(model))
    assert len(matrices) + len(results["skipped"]) == len(model.state_dict())
    of_matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(row["parameters"] for row in matrices.values()) == of_matrices
    assert all(row["numerical rank"] == min(row["rows"], row["columns"]) for row in matrices.values())


@pytest.mark.slow
def test_the_program_for_your_own_network_works(capsys, tmp_path, monkeypatch):
    """With fewer and smaller images; what falls back where outputs change too much is tested elsewhere."""
    program = BLOCKS["python"]
    assert len([line for line in program.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    given, smaller = "64, 3, 96, 96", "16, 3, 32, 32"
    assert given in program
    program = program.replace(given, smaller)
    monkeypatch.setattr(compression, "FAR", np.inf)
    exec(program, {})
    output = capsys.readouterr().out
    assert re.search(r"^parameters: 11,689,512 → 5,[\d,]+ \((49|50)\.\d%\)$", output, re.MULTILINE)
    assert re.search(r"^relative change of the outputs: predicted .*, measured .*\n\S+: rank ", output, re.MULTILINE)
