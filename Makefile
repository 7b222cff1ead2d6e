# `make help` lists the targets.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
LONGALIGN := $(BIN)/longalign
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(shell printf ',gpu'))

.DEFAULT_GOAL := help
.PHONY: help install demo results tiny-base test test-grid test-faults check format clean

help:  ## this list
	@echo "  train-MODEL-STRATEGY               $(MODELS) x $(STRATEGIES)"
	@echo "  model=                             $(PRESETS)"
	@grep -hE '^[a-z0-9%+.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-34s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## project and development tools into .venv, with the kernels for GPUs where there is one

# DeepSpeed's setup imports torch, so torch comes first and DeepSpeed is built against it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel hatchling editables numpy
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

demo: install  ## a small model learns to answer from long documents (two cores, a few minutes)
	$(BIN)/python scripts/demo.py

results: install  ## docs/results.md: a pretrained model from 8k to 64k on one GPU, in stages that can be stopped
	$(BIN)/python scripts/results.py

tiny-base: install  ## train the bundled tiny model again (see docs/tiny.md); about 9 minutes on one core
	$(LONGALIGN) prepare experiment=tiny_base output_dir=data/tiny_base/raw overwrite=true
	$(LONGALIGN) tokenize experiment=tiny_base overwrite=true
	$(LONGALIGN) train experiment=tiny_base output_dir=runs/tiny_base overwrite=true

test: install  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-grid: install  ## losses and gradients on every layout, not only a subset that covers every pair; 19 minutes
	$(BIN)/python -m pytest -m grid -rP

test-faults: install  ## twenty ranks killed at random moments, every run resumed exactly; 9 minutes on two cores
	$(BIN)/python -m pytest -m faults

check: install  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the demo made
	rm -rf runs/demo data/demo

# -- the paper's runs: 8 GPUs of 80 GB; data/raw/long.jsonl and data/raw/sharegpt.jsonl as in the README ------------
MODELS := chatglm3-6b llama2-7b llama2-13b
PRESETS := $(filter-out base,$(notdir $(basename $(wildcard conf/model/*.yaml))))
STRATEGIES := naive sorted packing packing+weighting balanced

tokenize-%: install  ## tokenize-MODEL: 0k, 5k and 10k long samples for one model
	$(LONGALIGN) tokenize -m model=$* datanum=0k,5k,10k

# train-MODEL-STRATEGY, e.g. train-llama2-7b-sorted
define train
train-$(1)-$(2): install
	$(LONGALIGN) train cluster=8gpu resume=auto model=$(1) strategy=$(2)
endef
$(foreach m,$(MODELS),$(foreach s,$(STRATEGIES),$(eval $(call train,$(m),$(s)))))

table3-%: install  ## table3-MODEL: the paper's Table 3, every strategy on 10k long samples
	$(LONGALIGN) train -m model=$* cluster=8gpu strategy=naive,sorted,packing,packing+weighting

table2: install  ## the paper's Table 2: 0k, 5k and 10k long samples, ChatGLM3-6B
	$(LONGALIGN) train -m model=chatglm3-6b cluster=8gpu datanum=0k,5k,10k
