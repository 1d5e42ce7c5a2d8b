# make demo    sets up, prepares data, trains the demo, writes runs/demo/report.html
# make test    sets up, passes the tests; make test-slow: those of more than 20 seconds (minutes in all)
# make oracle  what the real modules learn of a mixture of Gaussians: docs/results/gaussian_mixture.md (some CPU minutes)
# make check   style, types, the rule of imports
# make ablation-text   ways to hand text to the model, against each other: docs/results/text_frontends.md (some CPU hours)
# make ablation-time   objectives of media and ways to tell t, against each other: docs/results/time_conditioning.md (some CPU hours)
# make ablation-interference   does text help or hurt pictures and sounds in one trunk: docs/results/interference.md (an hour)
# make ablation-budget   pictures in fewer latents, against as many as they have patches: docs/results/budgeted_patches.md (40 CPU minutes)
# make env     sets up alone: one virtual environment, .venv
# make clean   removes the environment and caches; runs/, data/ and cache/ stay

# On a machine without a GPU the plain wheel brings some GB of CUDA libraries along: name another with TORCH=...
TORCH ?= torch==2.13.0
# Files of tests that run at once: each test takes one thread, tests of several ranks two to four.
AT_ONCE ?= --numprocesses 2 --dist loadfile
# The first of these that is there and has a version that the hosts have wheels for.
PYTHONS ?= python3.11 python3.12 python3 python
BIN := .venv/bin
STAMP := .venv/.installed
# Two that set up at once would write into each other's environment.
LOCK := $(shell command -v flock >/dev/null 2>&1 && echo flock .env.lock)
FITS := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))

.PHONY: env demo test test-slow oracle check ablation-text ablation-time ablation-interference ablation-budget clean

env:
	@$(LOCK) $(MAKE) --silent --no-print-directory $(STAMP)

# pip installs, in every case, because it is what the machine's owner has configured. deepspeed compiles nothing.
$(STAMP): pyproject.toml Makefile
	@for python in $(PYTHONS); do \
	    if command -v $$python >/dev/null && $$python -c '$(FITS)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -x $(BIN)/python ] && $(BIN)/python -c '$(FITS)'; then :; \
	elif [ -n "$$found" ]; then $$found -m venv --clear .venv; \
	elif command -v uv >/dev/null; then uv venv --clear --seed --python 3.11 .venv; \
	else echo "Python 3.11 or 3.12 with its venv module must be on PATH, got neither; install one, or uv" >&2; exit 2; fi
	@echo "setting up .venv: once, some minutes and up to some GB"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[demo,media,dev]"
	@touch $@

demo: env
	bash slurm/pretrain.sh

test: env
	$(BIN)/python -m pytest tests -q -rs -m "not slow" $(AT_ONCE)

test-slow: env
	$(BIN)/python -m pytest tests -q -rs -m slow $(AT_ONCE)

oracle: env
	$(BIN)/python tools/oracle/gaussian_mixture.py --json

check: env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

# A killed one goes on where it stood; remove runs/ablation/text to begin anew.
ablation-text: env
	bash slurm/prepare.sh configs/ablation/text/static.yaml
	$(BIN)/python tools/ablate/text_frontends.py --seeds 0,1,2 --bytes 400000 --out runs/ablation/text --document docs/results/text_frontends.md

# The same: a killed one goes on.
ablation-time: env
	bash slurm/prepare.sh configs/ablation/time/flow-add.yaml
	$(BIN)/python tools/ablate/time_conditioning.py --seeds 0,1,2 --out runs/ablation/time --document docs/results/time_conditioning.md

# Three single-modality arms and two joint ones, three seeds. Goes on where it stood likewise.
ablation-interference: env
	bash slurm/prepare.sh configs/ablation/interference/joint.yaml
	$(BIN)/python tools/ablate/interference.py --seeds 0,1,2 --steps 160

# Eleven arms, three seeds. Goes on where it stood likewise, a run at a time.
ablation-budget: env
	bash slurm/prepare.sh configs/ablation/budget/full.yaml
	$(BIN)/python tools/ablate/budgeted_patches.py --seeds 0,1,2

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find matformer data_prep tools tests -name __pycache__ -prune -exec rm -rf {} +
