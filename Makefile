# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
# Each step leaves a stamp in .venv once it has succeeded, so nothing is set up twice, and the next call completes an
# interrupted set-up. CONTRIBUTING.md explains the variables.

PYTHON ?= python3
COMPARE_ARGS ?=
DEMO_ARGS ?=
DOCS_ARGS ?=
EXAMPLE_ARGS ?=
GPU_ARGS ?=
KERNELS_ARGS ?=
LAUNCHES_ARGS ?=
PYTEST_ARGS ?=
STUDY_ARGS ?=

python := .venv/bin/python
# One worker for each core, but no more than eight: each imports torch. An idle worker takes tests over from the others.
tests := $(python) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal --benchmark-disable
# Triton decides at its import whether it interprets, so these tests take processes of their own.
interpreted_tests := TRITON_INTERPRET=1 $(tests) tests/kernels/interpreted
benches := $(python) -m pytest -v --benchmark-only
pip_install := $(python) -m pip install --disable-pip-version-check --no-input -c constraints.txt

# "===" takes exactly the default index's build, which is the CUDA one, and no local version such as +cpu.
# "==" takes a local version too, if pip has been shown one.
torch_version := $(shell sed -n 's/^torch==//p' constraints.txt)
has_gpu := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH := torch$(if $(has_gpu),===,==)$(torch_version)
torch_stamp := .venv/.$(subst =,-,$(TORCH))

# Make the environment anew if it belongs to another folder (a moved or copied checkout) or lacks its interpreter.
venv_stands := $(shell test -x $(python) && test "$$(cat .venv/.made 2>/dev/null)" = "$$(pwd -P)" && echo yes)
ifneq ($(venv_stands),yes)
.PHONY: .venv/.made
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# All targets share one environment, and the checks of `test` run in their order.
.NOTPARALLEL:
.PHONY: help setup demo test lint format typecheck imports pytest interpret kernels launches bench bench-cpu bench-functions bench-kfac \
    bench-compare study-accuracy study-kfac study-scaling study-roofline study-streams study-forms study-defaults study-expand-reduce gpu profile \
    examples docs-figures docs docs-check clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile

setup: .venv/.extra-test ## make the environment for demo, test and the checks

demo: .venv/.extra-demo ## run the demo (DEMO_ARGS="--quick" for the short one)
	.venv/bin/brandla demo $(DEMO_ARGS)

test: lint typecheck imports pytest ## run every check, and stop at the first that fails

lint: .venv/.extra-test ## ruff: the rules, then the format
	$(python) -m ruff check
	$(python) -m ruff format --check

format: .venv/.extra-test ## apply the fixes that ruff can make
	$(python) -m ruff check --fix
	$(python) -m ruff format

typecheck: .venv/.extra-test ## mypy, strict, on both packages
	$(python) -m mypy

imports: .venv/.extra-test ## import-linter: the layers
	.venv/bin/lint-imports

pytest: .venv/.extra-test ## the tests alone (PYTEST_ARGS="-k brand -x" is passed on; with it, `interpret` does not run)
	$(tests) $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(interpreted_tests))

interpret: .venv/.extra-test ## the kernels in Triton's interpreter, on the CPU (PYTEST_ARGS is passed on)
	$(interpreted_tests) $(PYTEST_ARGS)

kernels: .venv/.extra-test ## compile every kernel for every GPU target, and print a table (KERNELS_ARGS="--json FILE --targets sm_90")
	$(python) -m bench.kernels_table $(KERNELS_ARGS)

launches: .venv/.extra-bench ## count the GPU kernels of each public function and of a K-FAC step, beside their budgets (LAUNCHES_ARGS="--quick")
	$(python) -m bench.launches $(LAUNCHES_ARGS)

bench: .venv/.extra-bench ## bench-cpu and bench-functions in one run (PYTEST_ARGS is passed on)
	$(benches) $(addprefix bench/benches/bench_,updates.py functions.py) $(PYTEST_ARGS)

bench-cpu: .venv/.extra-bench ## speed and memory of the updates, on a quiet machine (PYTEST_ARGS="--quick" for the short one)
	$(benches) bench/benches/bench_updates.py $(PYTEST_ARGS)

bench-functions: .venv/.extra-bench ## every public function and op, compared with its peers (PYTEST_ARGS="--full" for larger sizes)
	$(benches) bench/benches/bench_functions.py $(PYTEST_ARGS)

bench-kfac: .venv/.extra-peers ## a step of every K-FAC system, of SGD and of other libraries (PYTEST_ARGS="--quick" for the short one)
	$(benches) bench/benches/bench_kfac.py $(PYTEST_ARGS)

bench-compare: .venv/.extra-bench ## compare new result files with the committed ones, in ratios; fail on a regression
	$(python) -m bench.compare $(COMPARE_ARGS)

# Each example runs by itself: first optimizers made of brandla's functions, then other uses of K-FAC and damped inverses.
examples := shampoo projection soap cosmos kl_shampoo gaussian_process influence evidence pinn
examples: .venv/.extra-demo ## train a transformer and a residual network with every system, and the other examples (EXAMPLE_ARGS="--system B-KFAC")
	$(python) -m examples.resnet $(EXAMPLE_ARGS)
	$(python) -m examples.transformer $(EXAMPLE_ARGS)
	$(if $(EXAMPLE_ARGS),,for name in $(examples); do $(python) -m examples.$$name || exit 1; done)

study-scaling: .venv/.extra-bench ## growth of time and memory with n, r and k (STUDY_ARGS="--quick", or "--full" on a GPU)
	$(python) -m bench.studies.scaling $(STUDY_ARGS)

study-roofline: .venv/.extra-bench ## the part of the measured ceilings that each op reaches (STUDY_ARGS as above)
	$(python) -m bench.studies.roofline $(STUDY_ARGS)

study-accuracy: .venv/.extra-bench ## errors of each tracker over a training run, at equal cost (STUDY_ARGS="--quick", "--resume")
	$(python) -m bench.studies.accuracy $(STUDY_ARGS)

study-kfac: .venv/.extra-peers ## steps and seconds to a target, of every K-FAC and other optimizers (STUDY_ARGS="--data FOLDER", "--full", "--resume")
	$(python) -m bench.studies.kfac_images $(STUDY_ARGS)

study-streams: .venv/.extra-bench ## losses, orthogonality and bounds on every stream (STUDY_ARGS="--quick" for the short one)
	$(python) -m bench.studies.streams $(STUDY_ARGS)

study-forms: .venv/.extra-bench ## accuracy of the two forms of Brand's update (STUDY_ARGS as above)
	$(python) -m bench.studies.forms $(STUDY_ARGS)

study-defaults: .venv/.extra-bench ## losses with each clip of K-FAC, on ten small tasks (STUDY_ARGS as above, "--resume")
	$(python) -m bench.studies.defaults $(STUDY_ARGS)

study-expand-reduce: .venv/.extra-bench ## steps to a target with expand and reduce, on transformers and graphs (STUDY_ARGS as above)
	$(python) -m bench.studies.expand_reduce $(STUDY_ARGS)

# GPU_PYTHON=python3 uses an interpreter that already has torch, Triton, pytest and rich, and installs nothing.
GPU_PYTHON ?= $(python)
gpu: $(if $(filter $(python),$(GPU_PYTHON)),.venv/.extra-test .venv/.extra-bench) ## tests and measurements on a GPU in 9 minutes (GPU_ARGS="--dry-run" without one)
	PYTHONPATH=.:kernels$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m bench.gpu $(GPU_ARGS)

# Sizes that are not named have the defaults of bench.profiling.
sizes_of_profile = $(foreach size,N R K M CORES,$(if $($(size)),--$(shell echo $(size) | tr A-Z a-z) '$($(size))'))
profile: .venv/.extra-bench ## one op, kernel by kernel (OP=cross_gram N=16384 R=256 K=256 DTYPE=float32), and the ncu line
	$(python) -m bench.profiling --op '$(OP)' $(sizes_of_profile) $(if $(DTYPE),--dtype '$(DTYPE)')

docs-figures: .venv/.extra-bench ## write the figures of the documentation from the result files: pages, pictures, CSV files, quoted numbers
	$(python) -m bench.report

docs: mkdocs.yml .venv/.extra-docs ## build the documentation into site/
	$(python) -m mkdocs build --strict

docs-check: docs ## open every page in a headless Chromium, and check widths, requests and errors (DOCS_ARGS="--pictures FOLDER")
	$(python) docs/_tools/check.py site $(DOCS_ARGS)

clean: ## remove caches and build products
	rm -rf build dist site *.egg-info .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find brandla kernels tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove the environment as well
	rm -rf .venv

.venv/.made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'brandla needs Python 3.11 or newer, and "$(PYTHON)" is' \
	        "$$("$(PYTHON)" --version 2>/dev/null || echo 'not there'). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
	@pwd -P > $@

$(torch_stamp): .venv/.made constraints.txt
	$(pip_install) '$(TORCH)' setuptools
	@rm -f .venv/.torch-*
	@touch $@

# The build uses the environment's own pinned setuptools, so every part of it is pinned.
.venv/.extra-%: $(torch_stamp) pyproject.toml constraints.txt
	$(pip_install) --no-build-isolation -e '.[$*]'
	@touch $@
