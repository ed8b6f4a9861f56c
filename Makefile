# Two commands carry the course: `make lab` and `make test`. Works with GNU make 3.81 (macOS) and later.
#   PYTHON=python3.12   build the environment on this interpreter
#   VENV=folder         keep the environment elsewhere than in .venv
#   ARGS="..."          passed on to the program that the target runs
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.installed
ARGS ?=
export PYTHON PIP_INSTALL_ARGS

# An environment made for another folder (the clone was moved or copied) is installed anew.
ifneq ($(shell cat "$(STAMP)" 2>/dev/null),$(shell pwd -P))
STALE = stale
endif

.DEFAULT_GOAL := help
.PHONY: help lab test build grade doctor bench-lab bench hostile vram-page finetune-drill clean stale
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

$(STAMP): pyproject.toml .ci/constraints.txt $(STALE)
	@sh .ci/environment "$(VENV)" "$@"

lab: $(STAMP)  ## open the course in JupyterLab, on your own copies (ARGS="--no-browser --port 9999")
	@$(PY) -m pefttools lab $(ARGS)

test: $(STAMP)  ## run all tests (ARGS="-k lora" for some of them)
	@$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

build: $(STAMP)  ## instructors: make course/ from solutions/ (EXECUTE=1 also runs the solutions)
	@$(PY) -m pefttools build $(if $(EXECUTE),--execute) $(ARGS)

grade: $(STAMP)  ## instructors: grade a folder of submissions (SUBMISSIONS=folder)
	@test -n "$(SUBMISSIONS)" || { echo "Which submissions? make grade SUBMISSIONS=folder"; exit 2; }
	@$(PY) -m pefttools grade "$(SUBMISSIONS)" $(ARGS)

class-drill: $(STAMP)  ## grade a class of 100 and kill the grader ten times, half an hour; writes docs/class_drill.md
	@$(PY) -m pefttools.grading.drill --to docs/class_drill.md $(ARGS)

bench-grading: $(STAMP)  ## submissions a minute beside stock nbgrader, half an hour; writes docs/grading_benchmark.md
	@$(PY) -m pefttools.bench.grading --to docs/grading_benchmark.md $(ARGS)

doctor: $(STAMP)  ## what works on this machine, and what to do about the rest
	@$(PY) -m pefttools doctor $(ARGS)

bench-lab: $(STAMP)  ## train the bundled model in eight ways, half an hour; writes docs/bundled_finetune.md
	@$(PY) -m pefttools.lab.compare $(ARGS)

finetune-drill: $(STAMP)  ## kill a fine-tune ten times a method and resume it, half an hour; writes docs/finetune_drill.md
	@$(PY) -m pefttools.lab.finetune_drill --to docs/finetune_drill.md $(ARGS)

bench: $(STAMP)  ## speed and memory beside peft and bitsandbytes, about an hour; writes docs/benchmarks.md (ARGS=--quick)
	@$(PY) -m pefttools.bench --to docs/benchmarks.md $(ARGS)

vram-page: $(STAMP)  ## the memory calculator as a page of its own, for demonstrations (needs: pip install voila)
	@$(PY) -m pefttools.widgets.vram_page $(ARGS)

hostile: $(STAMP)  ## attack the grader in every way we know, stock nbgrader beside it; writes docs/hostile.md
	@$(PY) tests/hostile/table.py --to docs/hostile.md $(ARGS)

clean:  ## remove the environment and caches; your work in my_course/ stays
	rm -rf "$(VENV)" .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
