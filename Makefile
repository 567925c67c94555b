# `make demo` and `make test` each set up what they need, in .venv, on a fresh machine.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# ComfyUI imports torchaudio; the newest torch and the last torchaudio refuse each other. This set works with both.
TORCH := torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0

.PHONY: test demo lint bench soak gpu setup toy-base toy-moa toy-addons toy-judges

# Two files of tests at a time, each with one thread: models this small gain nothing from a second one. Threads that wait
# for each other do not spin: beside another busy process tests took up to ten times as long.
test: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: setup
	$(RUN) -m training.demo

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/comfy --skip-prompt --no-enable-telemetry node validate

bench: setup
	$(RUN) -m tests.bench

soak: setup
	$(RUN) -m pytest -m slow -s

# What only a GPU can show: speed in its own precision, the host tests with little and with much of its memory, training.
gpu: setup
	$(RUN) -m tests.bench
	-COMFYUI_FLAGS="--lowvram --force-fp32" $(RUN) -m pytest tests/host
	-COMFYUI_FLAGS="--gpu-only --force-fp32" $(RUN) -m pytest tests/host
	$(RUN) -m training.throughput

# The toy models from scratch, every training at a rate that falls to nothing; each goes on where it was stopped.
# models/*/*.md say how the shipped ones were made.
TOY := $(RUN) -m training.toy
compiled = $(if $(shell command -v g++ || command -v clang++),--compiled)
resume = $(if $(wildcard runs/toy/$(1).safetensors),--resume)

toy-base: setup
	$(TOY) vae --run runs/toy --scenes 30000 --steps 20000 --batch 32 --lr 2e-3 $(compiled) $(call resume,vae)
	$(TOY) unet --run runs/toy --scenes 30000 --steps 20000 --batch 16 $(compiled) $(call resume,unet)
	$(TOY) assemble --run runs/toy --out models/checkpoints/moa-toy-base.safetensors

toy-moa: setup
	$(TOY) encoder --run runs/toy --scenes 12000 --steps 2000 $(call resume,encoder)
	$(TOY) render --out runs/toy/data --count 12000 --seed 0
	$(RUN) -m training.latents --data runs/toy/data --base models/checkpoints/moa-toy-base.safetensors
	$(RUN) -m training.train --config training/configs/toy.yaml $(if $(wildcard runs/toy/moa/checkpoints/*),--resume latest)
	test -e runs/toy/moa-toy-vital.safetensors || $(RUN) -m training.vital --keep 6 --data runs/toy/data \
		--base models/checkpoints/moa-toy-base.safetensors --moa runs/toy/moa/moa-toy.safetensors \
		--out runs/toy/moa-toy-vital.safetensors
	$(RUN) -m training.train --config training/configs/toy-vital.yaml \
		$(if $(wildcard runs/toy/moa-vital/checkpoints/*),--resume latest)
	cp runs/toy/moa-vital/moa-toy.safetensors models/moa

toy-addons: setup
	$(TOY) controlnet --run runs/toy --base models/checkpoints/moa-toy-base.safetensors --scenes 6000 --steps 2000 \
		$(compiled) $(call resume,controlnet)
	$(TOY) style-lora --run runs/toy --base models/checkpoints/moa-toy-base.safetensors --scenes 3000 --steps 450 \
		$(compiled) $(call resume,style-lora)
	for who in "man 18" "man 8" "woman 10"; do set -- $$who; name=$$1-$$2; \
		resume=$$(test -e runs/toy/lora-$$name.safetensors && echo --resume); \
		$(TOY) person-lora --run runs/toy --base models/checkpoints/moa-toy-base.safetensors --steps 350 \
			--word $$1 --person $$2 $(compiled) $$resume || exit 1; \
	done
	mkdir -p models/controlnet models/loras
	cp runs/toy/moa-toy-pose.safetensors models/controlnet
	cp runs/toy/moa-toy-sticker.safetensors models/loras
	for name in man-18 man-8 woman-10; do cp runs/toy/$$name.safetensors models/loras/moa-toy-$$name.safetensors; done

toy-judges: setup
	$(TOY) readout --run runs/toy --scenes 6000 --steps 1700 $(call resume,readout)
	cp runs/toy/judges.safetensors training/toy

# A stamp for the pack's own packages, and one for each ComfyUI whose requirements were installed beside them.
setup: $(VENV)/pack.stamp
	@host=$$($(RUN) -m training.comfyui) || exit 1; \
	if [ -n "$$host" ] && ! cmp -s "$$host/requirements.txt" $(VENV)/comfyui-requirements.txt; then \
		echo "Installing what the ComfyUI in $$host requires"; \
		$(RUN) -m pip install --quiet -r "$$host/requirements.txt" $(TORCH) && \
		cp "$$host/requirements.txt" $(VENV)/comfyui-requirements.txt; \
	fi

$(VENV)/pack.stamp: pyproject.toml requirements.txt training/requirements.txt tests/requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH) -r requirements.txt -r training/requirements.txt -r tests/requirements.txt
	touch $@
