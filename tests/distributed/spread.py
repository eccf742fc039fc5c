"""Two ways to an engine at ZeRO 3: every process reads the model, or only the main one does.

usage: spread.py RECIPE OUT. Writes OUT.RANK.json: the losses of three steps, and digests of what was learned.
"""

import hashlib
import json
import sys

import torch

from lclm.model.build import components
from lclm.recipe import load_recipe
from lclm.train.engine import Engine
from lclm.train.feed import Feed, inputs
from lclm.train.metrics import Clock
from lclm.train.optim import embedding_ids, parameter_groups
from lclm.train.processes import leave_processes, start_processes
from lclm.train.stages import build_engine, prepare, start_model, start_processor


def whole(recipe, stage, processes):
    """An engine around a model that every process has built."""
    model = start_model(recipe, None)
    torch.manual_seed(recipe.seed)  # LoRA's first weights are a function of it
    prepare(model, stage, recipe.engine.activation_checkpointing)
    groups = parameter_groups(components(model), stage.learn, embedding_ids(model))
    options = {
        "micro_batch": recipe.data.micro_batch,
        "accumulation": recipe.data.accumulation(processes.size),
    }
    return Engine(model, groups, recipe.engine, processes, zero=3, clip=stage.clip, **options)


def digest(weights):
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in weights.items()}


def steps(engine, recipe, stage, processes):
    feed = Feed(recipe, stage, engine.model.config, start_processor(recipe, None), processes)
    feed.go_to(None)
    losses = []
    for _ in range(3):
        for batch in feed.next_step(Clock()):
            loss = engine.deepspeed(**inputs(batch, processes.device), num_items_in_batch=100.0).loss
            engine.deepspeed.backward(loss)
            engine.deepspeed.step()
            losses.append(loss.item())
    feed.close()
    return losses


def main():
    recipe = load_recipe(sys.argv[1])
    processes = start_processes(recipe.engine)
    found = {}
    for name, stage in recipe.stages.items():
        for way in ("spread", "whole"):  # as in a run, nothing of DeepSpeed has been used before
            torch.manual_seed(5)
            if way == "whole":
                engine = whole(recipe, stage, processes)
            else:
                torch.manual_seed(5 + processes.rank)
                engine, _ = build_engine(recipe, stage, None, processes)
            before = digest(engine.learned_weights())
            meta = [n for n, value in engine.model.named_buffers() if value.is_meta]
            losses = steps(engine, recipe, stage, processes)
            found[f"{name} {way}"] = [before, losses, digest(engine.learned_weights()), meta]
            engine.close()
    with open(f"{sys.argv[2]}.{processes.rank}.json", "w") as file:
        json.dump(found, file)
    leave_processes()


if __name__ == "__main__":
    main()
