from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lclm.hub.card import write_card
from lclm.hub.facts import Facts, count_parameters, gather
from lclm.hub.markdown import block, plain, table
from lclm.hub.metadata import CardOptions
from lclm.hub.publish import prepare
from lclm.model import LCLMForConditionalGeneration
from tests.hub.material import CHECKPOINT, make_run
from tests.hub.server import HubServer

HOSTILE = (
    "---\nlicense: mit\n---\n\n# Title\n```\n| a | b |\r<script>alert(1)</script>\n![x](http://x)\x00\n    "
)


@pytest.fixture(scope="module")
def facts(published_run: Path) -> Facts:
    return gather(published_run / "stages/01-scratch/export", published_run, "scratch")


def card(facts: Facts, **options: Any) -> ModelCard:
    plots = [("report/saved.png", "Loss saved")]
    return ModelCard(write_card(facts, "acme/tiny", CardOptions(**options), plots, "scratch"))


def test_a_card_passes_the_hubs_validation(facts: Facts, hub: HubServer, tmp_path: Path) -> None:
    made = card(facts, licence="Apache-2.0", language=["en"], samples=4)
    made.validate()
    made.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.content == made.content
    data = read.data.to_dict()
    assert data["base_model"] == ["some-org/Reader-0.1b"] and data["base_model_relation"] == "finetune"
    assert data["license"] == "apache-2.0" and data["pipeline_tag"] == "text-generation"
    assert {"lclm", "4x"} <= set(data["tags"])
    found = {(r.dataset_config, r.metric_type): r.metric_value for r in read.data.eval_results}
    probe = facts.results["reconstruction"][0]
    assert found["4x, 64 tokens, 64 texts", "accuracy"] == round(probe["accuracy"]["compressed"]["mean"], 4)

    hub.repos.clear()
    with pytest.raises(ValueError, match="license"):
        ModelCard(made.content.replace("license: apache-2.0", "license: as I like")).validate()


def test_what_a_card_says_are_facts(facts: Facts) -> None:
    text = card(facts).text
    sizes = LCLMForConditionalGeneration.from_pretrained(CHECKPOINT).num_parameters()
    assert f"{sizes:,} parameters" in text
    assert "PSF-2.0" in text and "2,000,000 source tokens" in text and "| scratch |" in text
    assert 'revision="scratch"' in text and "](report/saved.png)" in text
    assert "Its decoder began with random weights" in text and "No licence was stated" in text
    assert "abc" in text and "2 lines of diff" in text
    assert "## Samples" not in text, "held-out documents are shown only when asked for"
    assert "adapter" not in text.split("## Training")[1].split("<details>")[0].split("| scratch |")[0]


def test_figures_of_other_weights_are_not_shown(published_run: Path) -> None:
    later = gather(published_run / "stages/02-adapter/export", published_run, "adapter")
    assert later.step == 425 and not later.results, "the probes ran at step 400"
    text = card(later)
    assert "No probe was run on exactly these weights" in text.text and not text.data.eval_results
    assert "2,125,000 source tokens" in text.text


def test_only_the_checkpoint_is_known(hub: HubServer, published_run: Path) -> None:
    made = card(gather(published_run / "stages/02-adapter/export"))
    made.validate()
    assert "not known here" in made.text and made.data.get("base_model") is None


def test_text_of_documents_breaks_nothing(hub: HubServer, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", recipe={"name": "a | <b>"})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for place, line in enumerate(lines):
        entry = json.loads(line)
        for text in entry.get("probes", {}).get("texts", []):
            text["written"] = text["truth"] = HOSTILE
        lines[place] = json.dumps(entry)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    manifest = tmp_path / "data" / "manifest.json"
    found = json.loads(manifest.read_text())
    source = {"name": HOSTILE, "licence": HOSTILE, "kind": "huggingface", "path": "org/data"}
    manifest.write_text(json.dumps({**found, "name": HOSTILE, "sources": [source]}))

    made = card(gather(run / "stages/01-scratch/export", run, "scratch"), samples=2)
    made.validate()
    assert made.data.to_dict()["datasets"] == ["org/data"]
    assert made.data.get("license") is None
    shown = made.text.split("## Samples")[1].split("## Training")[0]
    inside = [line for line in shown.splitlines() if "script" in line or "Title" in line or "```" in line]
    assert len(inside) >= 6 and all(line.startswith("    ") for line in inside)
    rows = [line for line in made.text.splitlines() if "alert" in line and line.startswith("|")]
    assert rows and all("<script" not in row and "\r" not in row and "\x00" not in row for row in rows)
    assert "\n# Title" not in made.text


@pytest.mark.usefixtures("one_plot")
def test_a_recipe_is_shown_without_secrets_and_places(tmp_path: Path) -> None:
    key = "AKIAVERYSECRET"
    data = {"sources": {"s": {"path": f"https://{key}:{key}@store.example/x?X-Amz-Signature={key}"}}}
    run = make_run(tmp_path / "run", recipe={"data": data})
    (revision,) = prepare(run, "acme/tiny", local=True)
    everything = b"".join(c if isinstance(c, bytes) else c.read_bytes() for c in revision.files.values())
    assert key.encode() not in everything and b"/scratch/ada" not in everything
    assert yaml.safe_load(revision.files["recipe.yaml"])["run_dir"] == "…/runs/made-up"


def test_parameters_are_counted_alike_in_both_layouts(facts: Facts) -> None:
    native, released = count_parameters(facts.folder)[0], count_parameters(CHECKPOINT)[0]
    assert native["encoder"] == released["encoder"] and native["adapter"] == released["adapter"]


def test_plain_and_block() -> None:
    assert plain("a|b\n<c> *d* [e](f) `g`") == r"a\|b &lt;c&gt; \*d\* \[e\](f) \`g\`"
    assert block("a\r\nb\n```") == "    a\n    b\n    ```"
    assert table(("x",), [("1 | 2\n3",)]).splitlines()[-1] == r"| 1 \| 2 3 |"
