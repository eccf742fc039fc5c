"""The model card: README.md with metadata that the Hub understands, from facts alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from huggingface_hub import ModelCard

from lclm.hub.facts import PACKAGES, Facts, base_models, longest_memory, random_parts, unlicensed
from lclm.hub.markdown import block, plain, table
from lclm.hub.metadata import CardOptions, licence_name, metadata

SAMPLE_CHARACTERS = 600


def write_card(
    facts: Facts,
    repo: str,
    options: CardOptions | None = None,
    plots: Sequence[tuple[str, str]] = (),
    revision: str | None = None,
) -> str:
    """The card's text. plots: (path in the repository, caption). revision: the tag to load it by."""
    options = options or CardOptions()
    sections = [
        _head(facts, repo),
        _loading(facts, repo, revision),
        _architecture(facts),
        _evaluation(facts, plots),
        _samples(facts, options.samples),
        _training(facts),
        _data(facts),
        _limitations(facts, options),
        _provenance(facts),
    ]
    data = metadata(facts, repo, options)
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _head(facts: Facts, repo: str) -> str:
    config = facts.config
    ratios = " or ".join(f"{ratio}" for ratio in config.ratios)
    total = sum(facts.parameters.values())
    stage = f" This is the model after stage {plain(facts.stage)}." if facts.stage else ""
    more = "" if facts.last_stage else " Its recipe has stages after that, which it has not been through."
    return (
        f"# {plain(repo.split('/')[-1])}\n\n"
        f"A Latent Context Language Model of {total:,} parameters: an encoder turns every {ratios} tokens of "
        "a long context into one latent vector, and a decoder reads the latents in place of the tokens "
        "([paper](https://arxiv.org/abs/2606.09659)). Trained with [lclm](#provenance)." + stage + more
    )


def _loading(facts: Facts, repo: str, revision: str | None) -> str:
    at = f', revision="{revision}"' if revision else ""
    if facts.layout == "native":
        load = (
            "from transformers import AutoModelForCausalLM, AutoProcessor, pipeline\n\n"
            f'name = "{repo}"\n'
            f'model = AutoModelForCausalLM.from_pretrained(name{at}, dtype="auto", trust_remote_code=True)\n'
            f"processor = AutoProcessor.from_pretrained(name{at}, trust_remote_code=True)"
        )
        short = (
            f"\n\nIn one call:\n\n```python\npipe = pipeline(model=name{at}, trust_remote_code=True)\n"
            'print(pipe(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])\n```'
        )
        note = (
            "`trust_remote_code=True` runs the Python files of this repository: read them first. It needs "
            "torch and transformers only. Where lclm is installed, `import lclm.model` makes the same calls "
            "work without it."
        )
    else:
        load = (
            "from lclm import LCLMForConditionalGeneration, LCLMProcessor\n\n"
            f'name = "{repo}"\n'
            f'model = LCLMForConditionalGeneration.from_pretrained(name{at}, dtype="auto")\n'
            f"processor = LCLMProcessor.from_pretrained(name{at})"
        )
        short = ""
        note = "This is the released layout (`encoder/`, `adapter/`, `decoder/`), which lclm reads."
    return f"""## How to load

```python
{load}

memory = {{"type": "memory", "text": open("report.txt").read()}}  # read as latents
question = {{"type": "text", "text": "What was the profit?"}}  # read as it is
messages = [{{"role": "user", "content": [memory, question]}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True)
output = model.generate(**inputs, max_new_tokens=256)
print(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```{short}

{note} On the command line: `lclm generate {repo} --memory report.txt --prompt "What was the profit?"`."""


def _architecture(facts: Facts) -> str:
    config = facts.config
    rows: list[tuple[str, str]] = []
    for part in ("encoder", "decoder"):
        inner = getattr(config, f"{part}_config")
        layers = f"{inner.num_hidden_layers} layer{'s' if inner.num_hidden_layers != 1 else ''}"
        shape = f"{inner.model_type}, {layers}, width {inner.hidden_size}"
        rows.append((part, f"{shape}; {facts.parameters.get(part, 0):,} parameters"))
    adapter = config.adapter + (
        f", {config.adapter_layers} attention layers" if config.adapter_layers else ""
    )
    rows.append(("adapter", f"{adapter}; {facts.parameters.get('adapter', 0):,} parameters"))
    rows += [
        (
            "tokens per latent",
            ", ".join(f"{r}{' (default)' if r == config.ratio else ''}" for r in config.ratios),
        ),
        ("window", f"{config.window} tokens, overlap {config.overlap}"),
        ("pooling", config.pooling),
        ("encoder attention", config.encoder_attention),
        ("precision of the files", ", ".join(facts.dtypes)),
    ]
    return "## Architecture\n\n" + table(("what", "value"), rows)


def _evaluation(facts: Facts, plots: Sequence[tuple[str, str]]) -> str:
    if facts.record is None:
        return ""
    parts = ["## Evaluation"]
    if facts.verdicts:
        parts.append(
            f"Probes on held-out data at step {facts.probed:,}, which is this checkpoint. Intervals: 95%, "
            "over held-out documents. Aims are the recipe's; without one, more than without the memory."
        )
        rows = [
            (
                f"{row.ratio}x", row.figure, row.where, f"{row.value:.3f} {row.unit}",
                "–" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}",
                row.aim, row.status, row.better or "–",
            )
            for row in facts.verdicts
        ]  # fmt: skip
        parts.append(table(("ratio", "figure", "on", "value", "interval", "aim", "verdict", "beside"), rows))
    else:
        parts.append("No probe was run on exactly these weights.")
    for reason, why in (facts.results.get("absent") or {}).items():
        parts.append(f"- Not measured: {plain(reason)}: {plain(why)}")
    parts += [
        f"![{path.split('/')[-1].removesuffix('.png')}]({path})\n\n{plain(caption)}"
        for path, caption in plots
    ]
    return "\n\n".join(parts)


def _samples(facts: Facts, count: int) -> str:
    texts = facts.results.get("texts") or []
    if not count or not texts:
        return ""
    parts = ["## Samples", "Written greedily from held-out text that the decoder read only as latents."]
    for text in texts[:count]:
        parts.append(f"**{plain(text['kind'])} at {plain(text['ratio'])}x**")
        names = {"context": "read as latents", "question": "asked", "truth": "truth", "written": "written"}
        for key, name in names.items():
            if text.get(key):
                shown = str(text[key])
                cut = " …" if len(shown) > SAMPLE_CHARACTERS else ""
                parts += [f"{name}:", block(shown[:SAMPLE_CHARACTERS] + cut)]
    return "\n\n".join(parts)


def _training(facts: Facts) -> str:
    if facts.record is None:
        return ""
    parts = ["## Training"]
    if facts.stages:
        rows = [
            (
                stage.name, stage.learns or "–", f"{stage.steps:,}",
                f"{facts.tokens[stage.name]:,}" if stage.name in facts.tokens else "–",
                "–" if stage.loss is None else f"{stage.loss:.4f}",
            )
            for stage in facts.stages
        ]  # fmt: skip
        head = ("stage", "learns (rate)", "steps", "source tokens", "training loss at its end")
        parts.append(table(head, rows))
    if facts.tokens:
        total = sum(facts.tokens.values())
        parts.append(f"{total:,} source tokens, counted before compression, were read in all.")
    if facts.recipe:
        from lclm.settings import to_yaml

        shown = block(to_yaml(facts.recipe).rstrip())
        parts.append(f"<details><summary>The resolved recipe</summary>\n\n{shown}\n\n</details>")
    return "\n\n".join(parts)


def _data(facts: Facts) -> str:
    if facts.record is None:
        return ""
    if not facts.record.datasets:
        return "## Data\n\nThe manifests of the training data could not be read where this card was made."
    rows = []
    for manifest in facts.record.datasets:
        sources = [s for s in manifest.get("sources") or [] if isinstance(s, dict)]
        licences = [
            f"{s.get('name', 'unnamed')} ({s.get('licence') or 'licence not noted'})" for s in sources
        ]
        tokens = [f"{count:,} ({name})" for name, count in (manifest.get("tokens") or {}).items()]
        rows.append(
            (
                manifest["use"], manifest.get("name", manifest["source"]), manifest.get("kind", "–"),
                f"{manifest.get('samples', 0):,}", f"{manifest.get('text_bytes', 0) / 1e6:,.2f} MB",
                "; ".join(tokens) or "–", "; ".join(licences) or "not noted",
                str(manifest.get("fingerprint", "–"))[:12],
            )
        )  # fmt: skip
    head = ("use", "data set", "kind", "samples", "text", "tokens", "sources and licences", "fingerprint")
    return "## Data\n\n" + table(head, rows)


def _limitations(facts: Facts, options: CardOptions) -> str:
    ratios = ", ".join(map(str, facts.config.ratios))
    lines = [
        "Latents are lossy: what is read as memory can be rendered wrongly, exact strings above all. Give "
        "what must be exact as plain text.",
        f"It reads {ratios} tokens per latent, and no other number.",
    ]
    if longest := longest_memory(facts):
        lines.append(
            f"Memories made of documents in training had at most {longest:,} tokens; longer ones are untried."
        )
    if parts := random_parts(facts):
        read = f" on {sum(facts.tokens.values()):,} source tokens" if facts.tokens else ""
        lines.append(
            f"Its {' and '.join(parts)} began with random weights and learned{read}: it knows nothing else."
        )
    if facts.record is None:
        lines.append("How it was trained and measured is not known here: only the checkpoint was published.")
    elif not facts.verdicts:
        lines.append("Nothing was measured of these weights.")
    lines += [
        f"{row.ratio}x, {plain(row.figure)} ({plain(row.where)}): {row.status}."
        for row in facts.verdicts
        if row.status != "met"
    ]
    if facts.record and not facts.last_stage:
        lines.append("It has not been through all stages of its recipe.")
    if names := unlicensed(facts):
        lines.append(f"The licence of some training data was not noted: {', '.join(map(plain, names))}.")
    if bases := options.base_model or base_models(facts):
        lines.append(f"It was made from {' and '.join(map(plain, bases))}: see the licences there, too.")
    if options.licence is None:
        lines.append("No licence was stated for the model.")
    elif licence_name(options.licence) == "other":
        lines.append(f"Licence: {plain(options.licence)}.")
    return "## Limitations\n\n" + _items(lines)


def _provenance(facts: Facts) -> str:
    if facts.record is None:
        return "## Provenance\n\nPublished with lclm from an exported checkpoint."
    found = facts.record.provenance
    versions = found.get("versions") or {}
    rows = [
        ("run", str(facts.recipe.get("name") or "–")),
        ("commit of lclm", str(found.get("commit") or "not known")),
    ]
    if isinstance(diff := found.get("diff"), str):
        lines = len(diff.splitlines())
        rows.append(("uncommitted changes", f"{lines:,} lines of diff" if lines else "none"))
    rows += [(name, str(versions[name])) for name in PACKAGES if name in versions]
    rows += [(name, str(found[name])) for name in ("seed",) if name in found]
    if facts.step is not None:
        rows.append(("step", f"{facts.step:,}"))
    for name, digest in (getattr(facts.config, "fingerprints", None) or {}).items():
        rows.append((f"fingerprint of {name}", str(digest)[:16]))
    return "## Provenance\n\n" + table(("what", "value"), rows)
