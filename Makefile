# rime_pl: `make help` lists the targets. The first call of any target sets up what is missing.

CONFIG ?= tiny
DATA ?= openmoji
SEED ?= $(if $(filter command environment,$(origin SEEDS)),$(firstword $(SEEDS)),0)
SEEDS ?= $(SEED)
CLAIM_SEEDS ?= 0 1 2
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RIME := $(VENV)/bin/rime

# `rime run` trains what is missing, and knows where a run lies: $(call train,STAGE,SEED), $(call folder,STAGE,SEED).
sft = $(patsubst --%,--sft.%,$(SFT_ARGS))
cma = $(sft) $(patsubst --%,--cma.%,$(CMA_ARGS))
refine-rl = $(cma)
base = $(if $(BASE),--base $(BASE))
train = $(RIME) run $(1) --corpus $(DATA) --recipe $(CONFIG) --seed $(2) $(base) $($(1)) $(ARGS)
folder = $$($(train) --print_folder)
$(if $(ANNOTATED),$(error ANNOTATED is gone. Use ARGS="--data.annotated_share $(ANNOTATED)"))
# The name of a table without its ending, as `rime run` names the corpus that it builds.
stem = $(patsubst %.csv,%,$(patsubst %.tsv,%,$(patsubst %.jsonl,%,$(patsubst %.parquet,%,$(notdir $(DATA:/=))))))
OUTPUT = runs/$(stem)-$(patsubst configs,2b,$(notdir $(CONFIG)))-seed$(SEED)

.DEFAULT_GOAL := help
.PHONY: help setup data base train-sft train-cma train-refine-rl compare compare-rl study-cot claims rank-all \
        tutorials test test-all torture lint docs release-check tensorboard gpu-check gpu-check-all bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  DATA=openmoji|scenes|mini|FOLDER|TABLE.csv  BASE=FOLDER  CONFIG=tiny|2b|FOLDER  SEED=0  SEEDS="0 1 2" (compare-rl)\n'
	@printf '  ARGS="--model.temperature 0.1" goes to the stage named, SFT_ARGS and CMA_ARGS to the stages before it.\n'

setup: $(READY) ## make .venv and install everything from constraints.txt
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo,test,lint,docs,tutorials]'
	@touch $@

data: ## build the corpus of DATA as WebDataset shards
base: ## make the tiny base model for DATA, from its training texts and pictures
data base: $(READY)
	$(RIME) run $@ --corpus $(DATA) --recipe $(CONFIG) --seed $(SEED) $(base) $(ARGS)

train-sft: ## stage 1: learn to rewrite and to embed
train-cma: ## stage 2: align the modes (trains whatever is missing before it)
train-refine-rl: ## stage 3: improve the rewrite where nobody annotated (after an SFT and a CMA with few rewrites)
train-sft train-cma train-refine-rl: train-%: $(READY)
	$(call train,$*,$(SEED))

compare: train-cma ## the CMA run next to its controls: further SFT, and alignment without the decisive term
	$(RIME) compare --run $(call folder,cma,$(SEED)) --output $(OUTPUT)/compare

study-cot: train-sft ## the SFT run next to runs with a chain of thought, latent or filler tokens, or nothing (DATA=scenes)
	$(RIME) compare --run $(call folder,sft,$(SEED)) --output $(OUTPUT)/study-cot

# All seeds in one call: the control with the same number of seconds needs the step times of all of them.
compare-rl: train-refine-rl ## the Refine-RL runs of SEEDS next to their controls: further CMA, shuffled rewards, other anchors
	for seed in $(filter-out $(SEED),$(SEEDS)); do $(MAKE) train-refine-rl SEED=$$seed || exit 1; done
	$(RIME) compare --run $(foreach seed,$(SEEDS),$(call folder,refine-rl,$(seed))) --output $(OUTPUT)/compare-rl

# One part of the claims: all CLAIM_SEEDS of one stage on one corpus. Its record is written after each seed, and each
# training that has finished is kept, so a stopped part goes on where it was. A record keeps the result of each seed:
# further seeds, also from another machine, join it.
PARTS := cma-openmoji sft-scenes cma-scenes sft-mini cma-mini refine_rl-openmoji refine_rl-scenes
PART ?= $(PARTS)
compared = $(wildcard $(foreach SEED,$(CLAIM_SEEDS),$(OUTPUT)/claims/$(1)))
TUNED = docs/results/tuning/sft-$(stem).json
tuned_weight = --model.lambda_ce $$($(VENV)/bin/python -c "import json; print(json.load(open('$(TUNED)'))['rewrite']['chosen'])")

claims: $(READY) ## the claims: PART=cma-openmoji CLAIM_SEEDS=0 is one part with one seed; all of them take more than a day
	$(if $(filter-out $(PARTS) refine_rl-mini,$(PART)),$(error PART must be of $(PARTS) refine_rl-mini, but is $(PART)))
	set -e; for part in $(PART); do $(MAKE) claims-$${part%%-*} DATA=$${part#*-}; done

tune: $(READY) ## choose the weight of the cross-entropy for rewrite and chain of thought on validation (DATA=scenes or mini)
	test -f $(TUNED) || { $(MAKE) train-sft SEED=$(firstword $(CLAIM_SEEDS)) && \
	  $(RIME) tune --run $(call folder,sft,$(firstword $(CLAIM_SEEDS))) --output $(TUNED); }

.PHONY: tune claims-sft claims-cma claims-refine_rl claims-sft-seed claims-cma-seed claims-page
claims-sft: tune
claims-sft claims-cma: claims-%: $(READY)
	set -e; for seed in $(CLAIM_SEEDS); do $(MAKE) claims-$*-seed SEED=$$seed; \
	  $(MAKE) claims-page STAGE=$* CLAIM_SEEDS=$$seed; done
claims-sft-seed: override ARGS += $(tuned_weight)
claims-sft-seed: $(READY)
	$(call train,sft,$(SEED))
	$(RIME) compare --run $(call folder,sft,$(SEED)) --tuned $(TUNED) --adaptive true --output $(OUTPUT)/claims/sft
claims-cma-seed: train-cma
	$(RIME) compare --run $(call folder,cma,$(SEED)) --adaptive true --output $(OUTPUT)/claims/cma
# All seeds in one call, as in compare-rl.
claims-refine_rl: $(READY)
	set -e; for seed in $(CLAIM_SEEDS); do $(MAKE) train-refine-rl SEED=$$seed; done
	$(RIME) compare --run $(foreach seed,$(CLAIM_SEEDS),$(call folder,refine-rl,$(seed))) \
	  --output $(foreach SEED,$(firstword $(CLAIM_SEEDS)),$(OUTPUT))/claims/refine_rl
	$(MAKE) claims-page STAGE=refine_rl
claims-page: $(READY)
	$(RIME) claims --compared $(call compared,$(STAGE))

rank-all: train-cma ## the same queries among all pictures of the corpus, distractors too
	run=$(call folder,cma,$(SEED)) && $(RIME) cma test --config $$run/config.yaml --model.init_adapter_from $$run/adapter \
	  --data.distractors true --run_dir $$run/all-pictures

tutorials: train-cma ## run the tutorials on the trained model, and write them as pages to build/tutorials (PAGES="03 04")
	RIME_TUTORIAL_RUN=$(call folder,cma,$(SEED)) $(VENV)/bin/python docs/tutorials/run.py $(PAGES)

test: $(READY) ## the fast tests, about 15 minutes on 2 cores
	$(VENV)/bin/pytest -m "not long and not gpu"
test-all: $(READY) ## the long tests: every stage through the command line, kill and resume, two processes
	$(VENV)/bin/pytest -m long

torture: $(READY) ## mutated inputs, then kills at random moments; the tables are in docs/results/
	$(VENV)/bin/python -m tests.torture.mutations && $(VENV)/bin/python -m tests.torture.kills

lint: $(READY) ## ruff, mypy and the import rules
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports

docs: $(READY) ## the site with these pages, the reference and the Python API, in build/site/html
	$(VENV)/bin/python -m docs.site.build

# The commands run in build/release and without PYTHONPATH, so that nothing of the checkout is imported.
EMPTY = build/release/empty/bin
release-check: export PYTHONPATH =
release-check: $(READY) ## wheel and sdist, the wheel in an empty environment, and three steps of training there
	rm -rf build/release && mkdir -p build/release/dist
	$(VENV)/bin/python -c "from setuptools.build_meta import build_sdist, build_wheel as wheel; \
	  build_sdist('build/release/dist'); wheel('build/release/dist')"
	$(PYTHON) -m venv build/release/empty
	$(EMPTY)/pip install --quiet --constraint constraints.txt build/release/dist/*.whl
	cd build/release && empty/bin/rime --help && empty/bin/rime shards scenes --output data --train_per_task 8 \
	  --val_per_task 2 --test_per_task 3 --captions 12 --val_contents 12 --test_contents 16
	cd build/release && empty/bin/rime base --data data --output base --vision_steps 2 --copy_steps 2 --num_steps 2
	cd build/release && empty/bin/rime sft fit --config configs/tiny/sft.yaml --config configs/data/scenes/sft.yaml \
	  --data.path data --model.backbone.name_or_path base --run_dir run --data.batch_size 4 --data.steps_per_epoch 3 \
	  --trainer.max_epochs 1 --model.optimizer.warmup_steps 1 --data.test_modes '[discriminative]'
	@echo "build/release/dist holds a wheel that installs and trains."

tensorboard: $(READY) ## look at the curves of all runs
	$(VENV)/bin/tensorboard --logdir runs

gpu-check: ## on a GPU, 6 minutes: each stage with a 2B-shaped model, pictures of many sizes; installs nothing
	$(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,$(PYTHON)) -m benchmarks.gpu --ragged $(ARGS)
gpu-check-all: $(READY) ## on a GPU: all checks with a 2B-shaped model in 4 bits, then seconds and memory of each run
	$(VENV)/bin/pytest tests/gpu -m gpu
	$(VENV)/bin/python -m benchmarks.gpu $(ARGS)

.venv-bench/.ready: constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable . --requirement benchmarks/requirements.txt
	@touch $@
bench: .venv-bench/.ready ## ratios against the peers, and memory of a large batch: about half an hour on one thread
	.venv-bench/bin/python -m benchmarks.contrastive_step
	.venv-bench/bin/python -m benchmarks.decisive
	.venv-bench/bin/python -m benchmarks.encode
	.venv-bench/bin/python -m benchmarks.memory
	.venv-bench/bin/python -m benchmarks.loading
	.venv-bench/bin/python -m benchmarks.stream
	.venv-bench/bin/python -m benchmarks.index

clean: ## remove runs, made models and built corpora (not .venv)
	rm -rf runs models data
