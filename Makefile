# make demo                                the whole method at preset tiny, from nothing, in about ten minutes on a laptop
# make demo DATA=my_clips RUN=runs/mine    the same on your own clips, docs/data.md; with PICTURES=0.2 a fifth of the
#                                          steps is on pictures
# make demo PRESET=toy                     the same at another preset; with STEPS=0.1 RUN=runs/short a tenth of its steps
# make demo FLAGS="--gradient-checkpointing"              more flags for the four training scripts
# make demo VAE="--size 9x64x64 --crop 9x32x32" RUN=...   more flags for vae.py
# make test                                the tests
# make table-prune                         a table of the paper at toy scale, three seeds; table-scores, table-vae,
#                                          table-disc, table-steps and table-speed as well; SEEDS=1 for a first look;
#                                          table-toy-prune, -toy-disc, -toy-steps, after `make demo PRESET=toy`
# make pictures                            the pictures of docs/, of what `make demo` and `make demo PRESET=toy` trained
# make clean                               deletes .venv, runs/tiny and runs/tables
# Training stages that are done say so and are skipped; one that was interrupted goes on where it was.

PYTHON ?= python3
DATA ?= shapes
PRESET ?= tiny
RUN ?= runs/$(PRESET)
SEEDS ?= 3
PY = .venv/bin/python
WHERE = --preset $(PRESET) --run "$(RUN)"
HOW = $(WHERE) $(if $(STEPS),--steps $(STEPS)) $(if $(PICTURES),--picture-share $(PICTURES)) $(FLAGS)

TABLES = table-scores table-vae table-prune table-disc table-steps table-speed table-toy-prune table-toy-disc table-toy-steps
# Clips per score; at toy enough to tell techniques apart.
CLIPS = $(if $(filter toy,$(PRESET)),192,96)

.PHONY: demo test pictures clean $(TABLES)

demo: .venv/ready
	$(PY) vae.py $(HOW) --data "$(DATA)" $(VAE)
	$(PY) sample.py $(WHERE) --report
	@printf 'Something to look at, to be reloaded later: $(RUN)/report.html, the VAE'"'"'s reconstructions\n'
	$(PY) dit.py $(HOW)
	$(PY) sample.py $(WHERE) --report
	@printf 'Reload $(RUN)/report.html: clips by the teacher\n'
	$(PY) prune.py $(HOW) $(if $(STEPS),--mask-steps $(STEPS))
	$(PY) distill.py $(HOW)
	$(PY) sample.py $(WHERE) --score $(CLIPS)
	@if $(PY) -m pip show --quiet coremltools 2> /dev/null; then set -x; $(PY) export_coreml.py $(WHERE); \
	else echo "Left out: the export. There is no coremltools for this Python or system."; fi
	$(PY) sample.py $(WHERE) --report
	@printf '\nMade in $(RUN): vae.pt, dit.pt, pruned.pt, student.pt; metrics.json, all figures.\n'
	@printf 'Open $(RUN)/report.html: clips, scores, masks, losses. Then ask for something of your own:\n'
	@printf '    $(PY) sample.py $(WHERE) --prompt "..." --out mine.gif\n'

test: .venv/ready
	$(PY) -m pytest -q tests

# --no-compile: Python compiles what is imported, a part of it, when it is.
.venv/ready: requirements.txt
	@echo "PyTorch and the rest are installed into .venv, once; that may take minutes"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

$(TABLES): .venv/ready
	$(PY) tests/tables.py $(@:table-%=%) --seeds $(SEEDS)

pictures: demo
	cp "$(RUN)/compare.gif" "$(RUN)/path.png" docs/
	$(PY) tests/pictures.py

clean:
	rm -rf .venv runs/tiny runs/tables
