# rime_pl: `make help` lists the targets. The first call of any target sets up what is missing.

CONFIG ?= configs/tiny
DATA ?= openmoji
SEED ?= $(if $(filter command environment,$(origin SEEDS)),$(firstword $(SEEDS)),0)
SEEDS ?= $(SEED)
ARGS ?=
SFT_ARGS ?=
CMA_ARGS ?=
PYTHON ?= python3

VENV := .venv
RIME := $(VENV)/bin/rime
READY := $(VENV)/.ready
CORPUS := data/$(DATA)
DATA_CONFIG := configs/data/$(DATA).yaml
LOSS_CONFIG := $(wildcard configs/data/$(DATA)-sft-cma.yaml)
LOSS_ARGS := $(addprefix --config ,$(LOSS_CONFIG))
REWARD_CONFIG := $(wildcard configs/data/$(DATA)-refine-rl.yaml)

# In the demos SFT and CMA see a tenth of the rewrites, and RL runs on the other pairs; else whatever there is.
ifneq ($(filter train-refine-rl compare-rl,$(MAKECMDGOALS)),)
ANNOTATED ?= $(if $(filter tiny,$(notdir $(CONFIG))),0.1,1)
ifneq ($(ANNOTATED),1)
override SFT_ARGS += --data.annotated_share $(ANNOTATED)
override CMA_ARGS += --data.annotated_share $(ANNOTATED)
RL_DATA := --data.annotated_share $(ANNOTATED) --data.rewrites unannotated
endif
else
override CMA_ARGS += $(ARGS)
endif

# ARGS goes to the stage named on the command line.
ifneq ($(filter train-sft study-writing,$(MAKECMDGOALS)),)
override SFT_ARGS += $(ARGS)
endif

# A run's folder is keyed by what decides its result: recipe files, corpus, seed and extra arguments.
key = $(shell { cat $(1) 2>/dev/null; echo '$(2)'; } | cksum | cut -d' ' -f1)
run = runs/$(1)-$(notdir $(CONFIG))-seed$(2)
RUN := $(call run,$(DATA),$(SEED))
SFT := $(RUN)/sft-$(call key,$(CONFIG)/sft.yaml $(DATA_CONFIG) $(LOSS_CONFIG),$(SFT_ARGS))
CMA := $(RUN)/cma-$(call key,$(CONFIG)/sft.yaml $(CONFIG)/cma.yaml $(DATA_CONFIG) $(LOSS_CONFIG),$(SFT_ARGS) $(CMA_ARGS))
RL_FILES := $(CONFIG)/sft.yaml $(CONFIG)/cma.yaml $(CONFIG)/refine_rl.yaml $(DATA_CONFIG) $(LOSS_CONFIG) $(REWARD_CONFIG)
RL := $(RUN)/refine-rl-$(call key,$(RL_FILES),$(SFT_ARGS) $(CMA_ARGS) $(ARGS))

# Only the tiny recipes train a base that is made here; the others name a real checkpoint.
ifeq ($(notdir $(CONFIG)),tiny)
BASE := models/tiny-$(DATA)
BASE_ARGS := --model.backbone.name_or_path $(BASE)
endif
# The words of the other languages would take the room of those that are trained.
BASE_FLAGS_openmoji := --tasks name_to_picture picture_to_name composed --vision_steps 400
STAGE_ARGS = $(addprefix --config ,$(wildcard $(DATA_CONFIG))) --data.path $(CORPUS) $(BASE_ARGS) --seed_everything $(SEED)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup data base train-sft train-cma train-refine-rl study-writing compare compare-rl \
        claims rank-all test test-all lint tensorboard gpu-check bench-setup bench clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  DATA=openmoji|scenes  CONFIG=configs/tiny|configs  SEED=0  SEEDS="0 1 2" (compare-rl)\n'
	@printf '  ARGS="--model.temperature 0.05" goes to the stage named, SFT_ARGS and CMA_ARGS to the runs before it.\n'
	@printf '  ANNOTATED: share of the rewrites that are shown before train-refine-rl (0.1 with configs/tiny, else 1).\n'

setup: $(READY) ## make .venv and install everything from constraints.txt
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[demo,test,lint]'
	@touch $@

data: $(CORPUS)/corpus.json ## build the corpus of DATA as WebDataset shards
$(CORPUS)/corpus.json: | $(READY)
	$(RIME) shards $(DATA) --output $(CORPUS)

base: models/tiny-$(DATA)/config.json ## make the tiny base model for DATA
models/tiny-$(DATA)/config.json: $(CORPUS)/corpus.json
	$(RIME) base --data $(CORPUS) --output $(dir $@) $(BASE_FLAGS_$(DATA))

SFT_FIT = $(RIME) sft fit --config $(CONFIG)/sft.yaml $(STAGE_ARGS) $(LOSS_ARGS) --run_dir $(SFT) $(SFT_ARGS)

train-sft: $(CORPUS)/corpus.json $(if $(BASE),$(BASE)/config.json) ## stage 1: learn to rewrite and to embed
	$(SFT_FIT)

$(SFT)/done.json: $(CORPUS)/corpus.json $(if $(BASE),$(BASE)/config.json)
	$(SFT_FIT)

CMA_FIT = $(RIME) cma fit --config $(CONFIG)/cma.yaml $(STAGE_ARGS) $(LOSS_ARGS) --model.init_adapter_from $(SFT)/adapter \
  --run_dir $(CMA) $(CMA_ARGS)

train-cma: $(SFT)/done.json ## stage 2: align the modes (runs whatever is missing before it)
	$(CMA_FIT)

$(CMA)/done.json: $(SFT)/done.json
	$(CMA_FIT)

train-refine-rl: $(CMA)/done.json ## stage 3: improve the rewrite where nobody annotated (after an SFT and a CMA with few rewrites)
	$(RIME) refine-rl fit --config $(CONFIG)/refine_rl.yaml $(STAGE_ARGS) $(addprefix --config ,$(REWARD_CONFIG)) $(RL_DATA) \
	  --model.init_adapter_from $(CMA)/adapter --run_dir $(RL) $(ARGS)

study-writing: train-sft ## the SFT run beside runs that write steps, pauses or nothing before they embed (DATA=scenes)
	$(RIME) compare --run $(SFT) --output $(RUN)/writing

compare: train-cma ## the controls beside the CMA run: further SFT steps, and alignment without the decisive term
	$(RIME) compare --run $(CMA) --output $(RUN)/compare

# All seeds at once: "as many seconds of further CMA" is counted from the step times of all of them.
compare-rl: train-refine-rl ## the controls beside the Refine-RL runs of SEEDS: further CMA, shuffled rewards, other anchors
	for seed in $(filter-out $(SEED),$(SEEDS)); do $(MAKE) train-refine-rl SEED=$$seed || exit 1; done
	$(RIME) compare --run $(foreach seed,$(SEEDS),$(subst $(RUN)/,$(call run,$(DATA),$(seed))/,$(RL))) --output $(RUN)/compare-rl

# Where the three targets above leave what `rime claims` reads.
CLAIM_SEEDS ?= 0 1 2
CLAIM_DATA := openmoji scenes
COMPARED = $(foreach seed,$(CLAIM_SEEDS),$(foreach data,$(CLAIM_DATA),$(call run,$(data),$(seed))/compare)) \
  $(foreach data,$(CLAIM_DATA),$(call run,$(data),$(firstword $(CLAIM_SEEDS)))/compare-rl) \
  $(foreach seed,$(CLAIM_SEEDS),$(call run,scenes,$(seed))/writing)

claims: $(READY) ## the three claims over three seeds, as a page under docs/: most of a day; finished runs are kept
	for seed in $(CLAIM_SEEDS); do \
	  $(MAKE) study-writing DATA=scenes SEED=$$seed || exit 1; \
	  for data in $(CLAIM_DATA); do $(MAKE) compare DATA=$$data SEED=$$seed || exit 1; done; \
	done
	for data in $(CLAIM_DATA); do \
	  $(MAKE) compare-rl DATA=$$data SEED=$(firstword $(CLAIM_SEEDS)) SEEDS="$(CLAIM_SEEDS)" || exit 1; \
	done
	$(RIME) claims --compared $(COMPARED)

rank-all: train-cma ## the same queries among all pictures of the corpus, distractors too
	$(RIME) cma test --config $(CMA)/config.yaml --model.init_adapter_from $(CMA)/adapter --data.distractors true \
	  --run_dir $(CMA)/all-pictures

test: $(READY) ## the fast tests, at most 10 minutes on 2 cores
	$(VENV)/bin/pytest -m "not long"

test-all: $(READY) ## the long tests: every stage through the command line, kill and resume, two processes
	$(VENV)/bin/pytest -m long

lint: $(READY) ## ruff, mypy and the import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

tensorboard: $(READY) ## look at the curves of all runs
	$(VENV)/bin/tensorboard --logdir runs

gpu-check: $(READY) ## where a GPU is: seconds and memory of every stage with a 2B-shaped model in 4 bits
	$(RIME) gpu-check $(ARGS)

bench-setup: .venv-bench/.ready ## the peers of the benchmarks, in an environment of their own
.venv-bench/.ready: constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable . --requirement benchmarks/requirements.txt
	@touch $@

bench: .venv-bench/.ready ## ratios against the peers, and memory of a large batch: about half an hour on one thread
	.venv-bench/bin/python -m benchmarks.contrastive_step
	.venv-bench/bin/python -m benchmarks.memory

clean: ## remove runs, made models and built corpora (not .venv)
	rm -rf runs models data
