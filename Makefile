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
        tutorials test test-all torture lint tensorboard gpu-check gpu-check-all bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  DATA=openmoji|scenes|mini|FOLDER|TABLE.csv  BASE=FOLDER  CONFIG=tiny|2b|FOLDER  SEED=0  SEEDS="0 1 2" (compare-rl)\n'
	@printf '  ARGS="--model.temperature 0.1" goes to the stage named, SFT_ARGS and CMA_ARGS to the stages before it.\n'

setup: $(READY) ## make .venv and install everything from constraints.txt
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo,tutorials,test,lint]'
	@touch $@

data: ## build the corpus of DATA as WebDataset shards
base: ## make the tiny base model for DATA, from its training texts and pictures
data base: $(READY)
	$(RIME) run $@ --corpus $(DATA) --recipe $(CONFIG) $(base)

train-sft: ## stage 1: learn to rewrite and to embed
train-cma: ## stage 2: align the modes (trains whatever is missing before it)
train-refine-rl: ## stage 3: improve the rewrite where nobody annotated (after an SFT and a CMA with few rewrites)
train-sft train-cma train-refine-rl: train-%: $(READY)
	$(call train,$*,$(SEED))

compare: train-cma ## the CMA run next to its controls: further SFT, and alignment without the decisive term
	$(RIME) compare --run $(call folder,cma,$(SEED)) --output $(OUTPUT)/compare

study-cot: train-sft ## the SFT run next to runs that write a chain of thought, filler tokens or nothing (DATA=scenes)
	$(RIME) compare --run $(call folder,sft,$(SEED)) --output $(OUTPUT)/study-cot

# All seeds in one call: the control with the same number of seconds needs the step times of all of them.
compare-rl: train-refine-rl ## the Refine-RL runs of SEEDS next to their controls: further CMA, shuffled rewards, other anchors
	for seed in $(filter-out $(SEED),$(SEEDS)); do $(MAKE) train-refine-rl SEED=$$seed || exit 1; done
	$(RIME) compare --run $(foreach seed,$(SEEDS),$(call folder,refine-rl,$(seed))) --output $(OUTPUT)/compare-rl

claims: $(READY) ## the three claims over CLAIM_SEEDS (0 1 2), as a page: most of a day; finished runs are kept
	set -e; for data in openmoji scenes; do \
	  for seed in $(CLAIM_SEEDS); do $(MAKE) compare DATA=$$data SEED=$$seed; done; \
	  $(MAKE) compare-rl DATA=$$data SEED=$(firstword $(CLAIM_SEEDS)) SEEDS="$(CLAIM_SEEDS)"; done; \
	  for seed in $(CLAIM_SEEDS); do $(MAKE) study-cot DATA=scenes SEED=$$seed; done
	$(RIME) claims --compared $(foreach SEED,$(CLAIM_SEEDS),$(foreach DATA,openmoji scenes,$(OUTPUT)/compare)) \
	  $(foreach DATA,openmoji scenes,$(foreach SEED,$(firstword $(CLAIM_SEEDS)),$(OUTPUT)/compare-rl)) \
	  $(foreach DATA,scenes,$(foreach SEED,$(CLAIM_SEEDS),$(OUTPUT)/study-cot))

rank-all: train-cma ## the same queries among all pictures of the corpus, distractors too
	run=$(call folder,cma,$(SEED)) && $(RIME) cma test --config $$run/config.yaml --model.init_adapter_from $$run/adapter \
	  --data.distractors true --run_dir $$run/all-pictures

tutorials: train-cma ## run the tutorials on the trained model, and write them as pages to build/tutorials (PAGES="03 04")
	RIME_TUTORIAL_RUN=$(call folder,cma,$(SEED)) $(VENV)/bin/python docs/tutorials/run.py $(PAGES)

test: $(READY) ## the fast tests, 10 to 14 minutes on 2 cores
	$(VENV)/bin/pytest -m "not long and not gpu"
test-all: $(READY) ## the long tests: every stage through the command line, kill and resume, two processes
	$(VENV)/bin/pytest -m long

torture: $(READY) ## mutated inputs, then kills at random moments; the tables are in docs/results/
	$(VENV)/bin/python -m tests.torture.mutations && $(VENV)/bin/python -m tests.torture.kills

lint: $(READY) ## ruff, mypy and the import rules
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports

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
