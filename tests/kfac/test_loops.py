"""Training loops of other libraries, from the recipes: each trains and resumes bit-equal to a loop by hand.

Blocks marked "py" run only here, if the packages are installed.
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

# Warnings of the loops and their imports are ignored, but warnings of K-FAC are errors.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:KFAC. (?!some factors)")]


def blocks(page):
    """Return the blocks of a page by heading."""
    parts = re.split(r"^#+ (.*)$", (RECIPES / f"{page}.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {heading: BLOCK.findall(text) for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def names_in(page, heading, *replacement):
    """Return the names that the first block under a heading defines, after an optional replacement of text."""
    source = blocks(page)[heading][0]
    names = {"torch": torch}
    exec(source.replace(*replacement) if replacement else source, names)
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


def optimizer_and_kfac(model):
    return torch.optim.SGD(model.parameters(), RATE), KFAC(model, Brand(rank=2))


def by_hand(model, losses, dtype, before, after):
    """Train, with ``before`` and ``after`` around K-FAC's step; losses are already divided."""
    optimizer, preconditioner = optimizer_and_kfac(model)
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
    # No model predicts the first word. Versions of Trainer differ in how often they count its label.
    labels = words.index_fill(1, torch.tensor([0]), -100)
    return [{"input_ids": sentence, "labels": label} for sentence, label in zip(words, labels, strict=True)]


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
    optimizer, preconditioner = optimizer_and_kfac(models[0])
    callback = names_in("training-loops", "Hugging Face Trainer")["WithKFAC"](preconditioner)
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
    """It resumes in the middle of an epoch, with dropout and a shuffled order."""

    def make_trainer(model, folder):
        if two_optimizers:
            preconditioner = KFAC(model, {"": Brand(rank=2), "transformer.wte": None})
            optimizer = torch.optim.SGD(preconditioner.parameters(), RATE)
            rest = torch.optim.AdamW(preconditioner.others(), 1e-3)
            callback = names_in("fine-tuning", "Fine-tuning")["WithKFAC"](preconditioner, rest)
        else:
            optimizer, preconditioner = optimizer_and_kfac(model)
            callback = names_in("training-loops", "Hugging Face Trainer")["WithKFAC"](preconditioner)
        loop = trainer(optimizer, callback, model, folder, max_steps=3, max_grad_norm=0)
        return loop, callback.parts if two_optimizers else {"kfac": preconditioner}

    torch.manual_seed(0)
    whole, resumed = gpt2(0.1), gpt2(0.1)
    make_trainer(whole, tmp_path)[0].train()
    checkpoint = tmp_path / "checkpoint-2"
    saved = torch.load(checkpoint / "kfac.pt")
    loop, parts = make_trainer(resumed, tmp_path / "again")
    for name, part in parts.items():
        part.load_state_dict(saved[name] if two_optimizers else saved)
    loop.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(resumed, whole)


def fitted(folder, model, epochs, checkpoint=None, **options):
    """Train with Lightning, and return its Trainer."""
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
    preconditioner = KFAC(module, Brand(rank=2), scaler=options.pop("scaler", None))
    loop = lightning.Trainer(
        callbacks=[names_in("training-loops", "Lightning")["WithKFAC"](preconditioner)],
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
    """Also on a CPU, where training equals training in float32 up to the rounding of float16."""
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
    """Return the Accelerator, and a function that trains on some examples."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if dtype == "bfloat16" else "no"
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, mixed_precision=precision)
    optimizer, preconditioner = optimizer_and_kfac(model)
    prepared = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(preconditioner)
    clip = () if most is None else ("unscale_gradients()", f"clip_grad_norm_(model.parameters(), {most})")
    train = names_in("training-loops", "accelerate", *clip)["train"]
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
