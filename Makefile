# make demo   everything, from a bare clone: data, base model, pruning on 2 ranks, samples, figures, report
# make compare  criteria side by side on digits (hours, resumable): docs/compare_digits.md
# make test   the quick tests          make test-full   all matrices          make lint   ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

COMPARED := ced,ced_abs,loss,shortgpt,ld_pruner,taylor,diff_pruning,random,every_other,gradient_flow,learned,spread_taylor,recovery_race
STUDIES := criteria,subsets,schedule,estimators,distill,sampling,depth,bases

.PHONY: install demo compare test test-full soak lint clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt tools/build_ops.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 >= 3.11 is needed; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "error: a C++ compiler (g++) is needed to build DeepSpeed's communication op" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: python3's venv module is needed (Debian: apt install python3-venv)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,dev]"
	$(BIN)/python tools/build_ops.py
	touch $@

demo: install
	$(BIN)/python tools/demo.py

compare: install
	test -f data_digits/val/index.json || $(BIN)/entprune-ds shards preset=digits out=data_digits
	$(BIN)/entprune-ds compare preset=digits_compare criteria=[$(COMPARED)] study=[$(STUDIES)] $(SETTINGS)
	cp runs/compare/compare.md docs/compare_digits.md
	cp runs/compare/compare.json docs/compare_digits.json
	cp runs/compare/criteria_fid.png docs/compare_digits.png

test: install lint
	$(BIN)/python -m pytest -q -m "not full"

test-full: install lint
	$(BIN)/python tools/test_full.py

soak: install  # half an hour of random kills, docs/SOAK.md; SETTINGS="--minutes 3"
	$(BIN)/python tools/soak.py $(SETTINGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf runs/demo runs/demo_base data_digits
