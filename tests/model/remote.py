"""What a checkpoint answers. As a program: what it answers where lclm, Liger and PEFT cannot be imported.

    python tests/model/remote.py FOLDER

FOLDER/todo.json: {"threads", "checkpoints": {name: {"prompts", "messages"}}}; FOLDER/NAME: each checkpoint.
Writes FOLDER/NAME.safetensors, and FOLDER/NAME.json with what is not a tensor.
"""

import importlib.util
import json
import sys
from pathlib import Path

ABSENT = ("lclm", "liger_kernel", "peft")
GREEDY = {"max_new_tokens": 6, "do_sample": False}


class Without:
    """A finder that does not find what is absent."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)


def answers(model, processor, prompts, messages):
    """(tensors, the rest): arrays of prompts and of a chat, latents, logits and greedy ids of both."""
    import torch

    inputs = {
        "prompts": processor(text=prompts),
        "chat": processor.apply_chat_template(messages, add_generation_prompt=True),
    }
    tensors = {}
    for name, arrays in inputs.items():
        tensors |= {f"{name}.{key}": value.clone() for key, value in arrays.items()}
        with torch.no_grad():
            tensors[f"{name}.logits"] = model(**arrays).logits
        tensors[f"{name}.latents"] = torch.cat(model.encode_memories(**arrays))
        tensors[f"{name}.generated"] = model.generate(**arrays, **GREEDY)
    return tensors, {"chat_template": processor.chat_template, "fingerprints": model.config.fingerprints}


def load_and_answer(folder, name, task):
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, pipeline

    source, trust = str(folder / name), {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(source, **trust)
    processor = AutoProcessor.from_pretrained(source, **trust)
    config = AutoConfig.from_pretrained(source, **trust)
    for loaded in (model, processor, config):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    tensors, rest = answers(model, processor, task["prompts"], task["messages"])
    if task.get("again"):
        reader = AutoModelForCausalLM.from_pretrained(source, encoder=False, **trust)
        assert reader.encoder is None
        assert type(AutoModel.from_pretrained(source, **trust)).__name__ == type(model).__name__
        rest["pipeline"] = pipeline(model=source, **trust)(task["messages"], **GREEDY)
        plain = pipeline("text-generation", model=source, **trust)
        rest["plain"] = plain("def add", return_full_text=False, **GREEDY)
        model.save_pretrained(folder / "again")
        processor.save_pretrained(folder / "again")
        again = AutoModelForCausalLM.from_pretrained(folder / "again", **trust)
        assert answers(again, processor, task["prompts"], task["messages"])[1]["fingerprints"]
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(rest))


def main(folder):
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    assert not any(importlib.util.find_spec(name) for name in ABSENT)
    import torch

    todo = json.loads((folder / "todo.json").read_text())
    torch.set_num_threads(todo["threads"])
    for name, task in todo["checkpoints"].items():
        load_and_answer(folder, name, task)
    assert not set(ABSENT) & set(sys.modules)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
