"""Other people's training loops, as the recipes have them: each trains as by hand, and resumes, to the bit.

Blocks marked "py" run here alone, where the packages are installed.
"""

import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from brandla.kfac import KFAC, Brand
from kfac.networks import assert_equal, loss_of, mlp

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
PAGES = {
    "training-loops": ("transformers", "lightning", "accelerate"),
    "fine-tuning": ("transformers", "accelerate", "peft"),
}
BLOCK = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RATE, ACCUMULATED = 0.03, 2
SETTINGS = [("float32", None), ("float32", 0.1), ("bfloat16", None)]

# The loops, and what they import, warn of their own matters; mistakes that K-FAC tells are none here.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:KFAC. (?!some factors)")]


def blocks(page):
    """Return the blocks of a page by the heading that they stand under."""
    parts = re.split(r"^#+ (.*)$", (RECIPES / f"{page}.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {heading: BLOCK.findall(text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def piece(page, heading, *other):
    """Return what the first block under a heading defines, with one call in another's place if asked."""
    source = blocks(page)[heading][0]
    names = {"torch": torch}
    exec(source.replace(*other) if other else source, names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_a_recipe_runs_as_it_stands(page, tmp_path, monkeypatch):
    for package in PAGES[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.random.fork_rng(devices=[]):
        for source in itertools.chain(*blocks(page).values()):
            exec(compile(source, page, "exec"), names)
    assert list(tmp_path.iterdir()) == []


network = partial(mlp, 12, 16, 8, dtype=torch.float32)


def examples(count=64):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 12), torch.randint(8, (count,)))


def parts(model):
    return torch.optim.SGD(model.parameters(), RATE), KFAC(model, Brand(rank=2))


def by_hand(model, losses, dtype, before, after):
    """Train, with ``before`` and ``after`` around K-FAC's step; losses are divided already."""
    optimizer, preconditioner = parts(model)
    for number, loss in enumerate(losses, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        value.backward()
        if number % ACCUMULATED == 0:
            before()
            preconditioner.step()
            after()
            optimizer.step()
            optimizer.zero_grad()


def clip_to(model, most):
    return lambda: None if most is None else nn.utils.clip_grad_norm_(model.parameters(), most)


def expected(dtype, before=None, after=None):
    """Train the small network by hand, with gradients clipped before or after K-FAC."""
    model = network()
    losses = [lambda batch=batch: loss_of(model, batch) / ACCUMULATED for batch in DataLoader(examples(), 8)]
    by_hand(model, losses, dtype, clip_to(model, before), clip_to(model, after))
    return model


def gpt2(dropout):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def sentences():
    torch.manual_seed(1)
    words = torch.randint(40, (64, 10))
    # No model predicts the first word; how often Trainer counts it depends on its version.
    labels = words.index_fill(1, torch.tensor([0]), -100)
    return [{"input_ids": one, "labels": own} for one, own in zip(words, labels, strict=True)]


def trainer(optimizer, callback, model, folder, **options):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=ACCUMULATED,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=2,
        **options,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=sentences(), optimizers=(optimizer, None), callbacks=[callback]
    )


@pytest.mark.parametrize(("dtype", "most"), SETTINGS)
def test_trainer_trains_as_by_hand(tmp_path, dtype, most):
    torch.manual_seed(0)
    models = [gpt2(0.0), gpt2(0.0)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"train_sampling_strategy": "sequential", "max_grad_norm": most or 0, "bf16": dtype == "bfloat16"}
    optimizer, preconditioner = parts(models[0])
    callback = piece("training-loops", "Hugging Face Trainer")["WithKFAC"](preconditioner)
    trainer(optimizer, callback, models[0], tmp_path, num_train_epochs=1, save_strategy="no", **options).train()
    batches = [
        {name: torch.stack([one[name] for one in sentences()[at : at + 8]]) for name in ("input_ids", "labels")}
        for at in range(0, 64, 8)
    ]
    words = ACCUMULATED * 8 * 9
    losses = [lambda batch=batch: models[1](**batch, num_items_in_batch=words).loss for batch in batches]
    by_hand(models[1].train(), losses, dtype, clip_to(models[1], most), lambda: None)
    assert_equal(models[0], models[1])


@pytest.mark.parametrize("two_optimizers", [False, True])
def test_trainer_resumes_to_the_bit(tmp_path, two_optimizers):
    """In the middle of an epoch, with dropout and a shuffled order."""

    def made(model, folder):
        if two_optimizers:
            preconditioner = KFAC(model, {"": Brand(rank=2), "transformer.wte": None})
            optimizer = torch.optim.SGD(preconditioner.parameters(), RATE)
            rest = torch.optim.AdamW(preconditioner.others(), 1e-3)
            callback = piece("fine-tuning", "Fine-tuning")["WithKFAC"](preconditioner, rest)
        else:
            optimizer, preconditioner = parts(model)
            callback = piece("training-loops", "Hugging Face Trainer")["WithKFAC"](preconditioner)
        loop = trainer(optimizer, callback, model, folder, max_steps=3, max_grad_norm=0)
        return loop, callback.parts if two_optimizers else {"kfac": preconditioner}

    torch.manual_seed(0)
    whole, resumed = gpt2(0.1), gpt2(0.1)
    made(whole, tmp_path)[0].train()
    checkpoint = tmp_path / "checkpoint-2"
    saved = torch.load(checkpoint / "kfac.pt")
    loop, known = made(resumed, tmp_path / "again")
    for name, part in known.items():
        part.load_state_dict(saved[name] if two_optimizers else saved)
    loop.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(resumed, whole)


def fitted(folder, model, epochs, checkpoint=None, **options):
    """Train by Lightning."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = model

        def training_step(self, batch):
            return loss_of(self.inner, batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE)

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    loop = lightning.Trainer(
        callbacks=[
            piece("training-loops", "Lightning")["WithKFAC"](
                KFAC(module, Brand(rank=2), scaler=options.pop("scaler", None))
            )
        ],
        accumulate_grad_batches=ACCUMULATED,
        max_epochs=epochs,
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
        **options,
    )
    loop.fit(module, DataLoader(examples(), 8), ckpt_path=checkpoint)
    return loop


@pytest.mark.parametrize(("dtype", "most"), SETTINGS)
def test_lightning_trains_as_by_hand(tmp_path, dtype, most):
    model = network()
    precision = "bf16-mixed" if dtype == "bfloat16" else "32-true"
    fitted(tmp_path, model, 1, precision=precision, gradient_clip_val=most)
    assert_equal(model, expected(dtype, after=most))


def test_lightning_takes_the_scaler_of_float16(tmp_path):
    """On a CPU too: training is that in float32, but for what float16 rounds."""
    precision = pytest.importorskip("lightning.pytorch.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = network()
    fitted(tmp_path, model, 1, scaler=scaler, plugins=precision.MixedPrecision("16-mixed", "cpu", scaler=scaler))
    torch.testing.assert_close(model.state_dict(), expected("float32").state_dict(), rtol=0, atol=1e-3)


def test_lightning_resumes_to_the_bit(tmp_path):
    whole, first, resumed = network(), network(), network(seed=1)
    fitted(tmp_path, whole, 2)
    fitted(tmp_path, first, 1).save_checkpoint(tmp_path / "one.ckpt")
    fitted(tmp_path, resumed, 2, tmp_path / "one.ckpt")
    assert_equal(resumed, whole)


def accelerated(model, dtype="float32", most=None):
    """Return accelerate's object, and a function that trains on some examples."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if dtype == "bfloat16" else "no"
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, mixed_precision=precision)
    optimizer, preconditioner = parts(model)
    prepared = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(preconditioner)
    clip = () if most is None else ("unscale_gradients()", f"clip_grad_norm_(model.parameters(), {most})")
    train = piece("training-loops", "accelerate", *clip)["train"]
    return accelerator, lambda data: train(accelerator, *prepared, DataLoader(data, 8), preconditioner)


@pytest.mark.parametrize(("dtype", "most"), SETTINGS)
def test_accelerate_trains_as_by_hand(dtype, most):
    model = network()
    accelerated(model, dtype, most)[1](examples())
    assert_equal(model, expected(dtype, before=most))


def test_accelerate_resumes_to_the_bit(tmp_path):
    whole, resumed = network(), network(seed=1)
    accelerator, train = accelerated(whole)
    train(examples())
    accelerator.save_state(str(tmp_path))
    train(examples())
    accelerator, train = accelerated(resumed)
    accelerator.load_state(str(tmp_path))
    train(examples())
    assert_equal(resumed, whole)
