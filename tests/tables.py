"""The paper's tables at toy scale: what each compares is trained with several seeds, scored, and
printed as Markdown.

    python tests/tables.py prune              # or scores, vae, disc, steps, speed
    python tests/tables.py toy-prune          # or toy-disc, toy-steps: at preset toy
    python tests/tables.py prune --seeds 1    # a first look        -> runs/tables/prune.md
    python tests/tables.py --check            # what README.md and docs/experiments.md say otherwise

A row is a command of the six scripts, run in a folder of its own and scored; what it starts from
(the four training scripts at preset tiny) is made once per seed, in runs/tables/chain; for seed 0
it is what `make demo` made. At preset toy all seeds start from what `make demo PRESET=toy` made.
Everything resumes. Rows run side by side, each on one core: on two, that gets a third more done
than one row after the other on both. With --jobs 1 a row has all cores, or the GPU.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from common import report  # noqa: E402

OUT = ROOT / "runs" / "tables"
SCORE = "sample.py --score"
# Less than half of the preset's recovery: after all of it rows look alike.
PRUNE = "prune.py --mask-steps 50 --steps 80"
SCRATCH = "dit.py --depth 5 --heads 5 --ffn 384"
# The adversarial loss alone, for longer than the preset's 65 steps, after which it is at chance.
START = "distill.py --distillation 0 --adversarial 1 --lr 0.001 --d-warmup 0.2 --steps"
ALONE = f"{START} 150"
# At preset toy: short schedules, so that a row takes minutes.
TOY_PRUNE = "prune.py --mask-steps 50 --steps 200"
TOY_DISTILL = "distill.py --steps 150"
# Clips on which 8x32x32 still leaves a grid.
LARGE = ("vae.py --size 9x128x128 --patch 4 --width 32 --latent-channels 64 --clips 1536 "
         "--steps 400 --batch-size 4 --ratio")

# A column: its title, the stages in metrics.json where it may stand, its key, a factor, decimals.
D_ACCURACY = ("discriminator accuracy, %", ("distill",), "d_accuracy", 100, 1)
VAE_COLUMNS = [("PSNR, dB", ("vae",), "psnr_db", 1, 1), ("VAE, s", ("vae",), "seconds", 1, 0),
               ("DiT, s", ("dit",), "seconds", 1, 0)]
SCORES = {
    "params": ("params, M", ("score",), "params", 1e-6, 2),
    "nfe": ("NFE", ("score",), "nfe", 1, 0),
    "seconds_per_clip": ("ms per clip", ("score",), "seconds_per_clip", 1e3, 1),
    "validation_loss": ("validation loss", ("score",), "validation_loss", 1, 4),
    "text_alignment": ("text alignment, %", ("score",), "text_alignment", 100, 1),
    "held_out_alignment": ("unseen combinations, %", ("score",), "held_out_alignment", 100, 1),
    "color": ("colour, %", ("score",), "color", 100, 1),
    "shape": ("shape, %", ("score",), "shape", 100, 1),
    "direction": ("direction, %", ("score",), "direction", 100, 1),
    "outline_iou": ("outline IoU, %", ("score",), "outline_iou", 100, 1),
    "subject_consistency": ("subject consistency", ("score",), "subject_consistency", 1, 3),
    "motion_smoothness": ("motion smoothness", ("score",), "motion_smoothness", 1, 4),
    "dynamic_degree": ("dynamic degree, 1e-3", ("score",), "dynamic_degree", 1e3, 1),
    "frechet": ("Fréchet, 1e-3", ("score",), "frechet", 1e3, 2),
}
ALIGNMENT = ["text_alignment", "held_out_alignment", "outline_iou"]
ASPECTS = ["color", "shape", "direction"]
MOTION = ["subject_consistency", "motion_smoothness", "dynamic_degree"]


def columns(*keys):
    return [SCORES[key] for key in keys]


def vae_row(ratio, dit_steps):
    """dit_steps: as many as take about as long as at the other ratios."""
    return [f"{LARGE} {ratio}", f"dit.py --steps {dit_steps}", f"{SCORE} --sampling-steps 20"]


# table -> its columns, and its rows: {name: command, or commands}.
TABLES = {
    "scores": (  # known to be worse and worse: less and less training, the caption ignored
        columns("validation_loss", *ALIGNMENT, *ASPECTS, *MOTION, "frechet"),
        {"teacher, 780 steps": "dit.py",
         "teacher, 300 steps": "dit.py --steps 300",
         "teacher, 100 steps": "dit.py --steps 100",
         "teacher, 30 steps": "dit.py --steps 30",
         "teacher, 780 steps, CFG scale 0": f"{SCORE} --cfg 0"}),
    "vae": (
        [*VAE_COLUMNS, *columns(*ALIGNMENT, *ASPECTS, *MOTION, "frechet")],
        {"4x16x16: 192 tokens, 150 steps": vae_row("4x16x16", 150),
         "8x16x16: 128 tokens, 250 steps": vae_row("8x16x16", 250),
         "8x32x32: 32 tokens, 1,000 steps": vae_row("8x32x32", 1000),
         "8x64x64: 8 tokens, 2,000 steps": vae_row("8x64x64", 2000)}),
    "prune": (
        columns("params", "validation_loss", *ALIGNMENT, "frechet"),
        {"blocks alone, 5 of 7": f"{PRUNE} --blocks 5 --heads 8 --ffn 512",
         "heads alone, 3 of 8": f"{PRUNE} --blocks 7 --heads 3 --ffn 512",
         "FFN alone, 192 of 512": f"{PRUNE} --blocks 7 --heads 8 --ffn 192",
         "blocks 6, heads 6, FFN 440": f"{PRUNE} --blocks 6 --heads 6 --ffn 440",
         "**5 / 5 / 384: learned masks, both KD**": PRUNE,
         "Taylor importance": f"{PRUNE} --criterion taylor",
         "magnitude": f"{PRUNE} --criterion magnitude",
         "random": f"{PRUNE} --criterion random",
         "learned masks, KD of the output": f"{PRUNE} --kd output",
         "learned masks, no KD": f"{PRUNE} --kd",
         "from scratch, 130 steps": f"{SCRATCH} --steps 130",
         "**260 steps: learned masks, both KD**": "prune.py",
         "from scratch, 260 steps": f"{SCRATCH} --steps 260",
         "from scratch, 1,040 steps": f"{SCRATCH} --steps 1040"}),
    "disc": (
        [D_ACCURACY, *columns(*ALIGNMENT, "frechet")],
        {"the pruned model, before any of it": f"{START} 1",
         "**the paper's: 3 frozen blocks, 1 trainable**": ALONE,
         "a linear layer on the 3 frozen": f"{ALONE} --trainable-blocks 0",
         "a convolution on the 3 frozen": f"{ALONE} --d-head convolution",
         "none frozen, 4 trainable": f"{ALONE} --frozen-blocks 0 --trainable-blocks 4",
         "K = 1": f"{ALONE} --frozen-blocks 1",
         "K = 2": f"{ALONE} --frozen-blocks 2",
         "no time conditioning": f"{ALONE} --no-time-conditioning",
         "distillation term, no adversary": "distill.py --adversarial 0",
         "**both** (the preset)": "distill.py"}),
    "steps": (
        columns("nfe", *ALIGNMENT, "frechet"),
        {"student, 1 step": "distill.py --sampling-steps 1",
         "student, 2 steps": "distill.py --sampling-steps 2",
         "student, 8 steps": "distill.py --sampling-steps 8",
         "**student, 4 steps**": "distill.py",
         "teacher, 2 steps, CFG": f"{SCORE} --sampling-steps 2",
         "teacher, 4 steps, CFG": f"{SCORE} --sampling-steps 4",
         "teacher, 10 steps, CFG": f"{SCORE} --sampling-steps 10",
         "teacher, 40 steps, CFG": f"{SCORE} --sampling-steps 40",
         "teacher, 4 steps, no CFG": f"{SCORE} --sampling-steps 4 --cfg 1",
         "teacher, 40 steps, no CFG": f"{SCORE} --sampling-steps 40 --cfg 1"}),
    "speed": (
        columns("params", "nfe", "seconds_per_clip", *ALIGNMENT, *MOTION, "frechet"),
        {"teacher": "dit", "pruned": "pruned", "student": "student"}),
    "toy-prune": (
        columns("params", "validation_loss", *ALIGNMENT, "frechet"),
        {"learned masks": TOY_PRUNE,
         "Taylor importance": f"{TOY_PRUNE} --criterion taylor",
         "random": f"{TOY_PRUNE} --criterion random",
         "from scratch": "dit.py --depth 5 --heads 5 --ffn 576 --steps 250"}),
    "toy-steps": (
        columns("nfe", *ALIGNMENT, "frechet"),
        {"student, 1 step": f"{TOY_DISTILL} --sampling-steps 1",
         "student, 2 steps": f"{TOY_DISTILL} --sampling-steps 2",
         "student, 4 steps": TOY_DISTILL,
         "teacher, 4 steps, no CFG": f"{SCORE} 192 --sampling-steps 4 --cfg 1",
         "teacher, 40 steps, CFG": f"{SCORE} 192"}),
    "toy-disc": (
        [D_ACCURACY, *columns(*ALIGNMENT, "frechet")],
        {"the pruned model, before any of it": f"{START} 1",
         "the paper's: 3 frozen blocks, 1 trainable": ALONE,
         "a linear layer on the 3 frozen": f"{ALONE} --trainable-blocks 0",
         "a convolution on the 3 frozen": f"{ALONE} --d-head convolution",
         "distillation term, no adversary": f"{TOY_DISTILL} --adversarial 0",
         "both": TOY_DISTILL}),
}
CHAIN = {"vae.py": "vae.pt", "dit.py": "dit.pt", "prune.py": "pruned.pt",
         "distill.py": "student.pt"}
INPUTS = {"vae.py": {}, "dit.py": {"latents": "latents.pt"},
          "prune.py": {"latents": "latents.pt", "dit": "dit.pt"},
          "distill.py": {"latents": "latents.pt", "pruned": "pruned.pt", "teacher": "dit.pt"},
          "sample.py": {"latents": "latents.pt", "vae": "vae.pt"}}


def run(folder, seed, commands, threads, inputs):
    """Commands, one after the other, with what they say in folder/log; those that are done are
    skipped. inputs: the folder with the files that they start from, named as their preset but for
    runs/tables/chain."""
    preset = "toy" if inputs.name == "toy" else "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    for command in commands:
        if done.exists() and command in done.read_text().splitlines():
            continue
        script, *flags = command.split()
        for name, file in INPUTS[script].items():
            flags += [f"--{name}", inputs / file]
        with open(folder / "log", "a") as log:
            status = subprocess.run(
                [sys.executable, ROOT / script, "--preset", preset, "--run", folder,
                 "--seed", str(seed), *flags],
                env=dict(os.environ, OMP_NUM_THREADS=threads), stdout=log, stderr=log).returncode
        if status:
            raise RuntimeError(f"`{command}` ended with status {status}: see {folder / 'log'}")
        with open(done, "a") as file:
            file.write(command + "\n")


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def row(folder, seed, commands, threads, chain, made):
    """-> the metrics of a row with one seed; made: a future, done when the chain is."""
    made.result()
    if isinstance(commands, list):  # its own data and autoencoder
        run(folder, seed, commands, threads, folder)
    elif commands in CHAIN or commands.startswith(SCORE):
        # Without a flag it is the chain's own; scoring alone is of the chain's teacher.
        file = CHAIN.get(commands, "dit.pt")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / file).exists():
            (folder / file).symlink_to(chain / file)
        run(folder, seed, [SCORE if commands in CHAIN else commands], threads, chain)
    else:
        score = f"{SCORE} 192" if chain.name == "toy" else SCORE
        run(folder, seed, [commands, score], threads, chain)
    metrics = read_metrics(folder)
    if commands in list(CHAIN):
        stage = Path(commands).stem
        metrics[stage] = read_metrics(chain)[stage]
    _, score = metrics["score"].popitem()  # of the one checkpoint that this folder has
    return {**metrics, "score": score}


def cell(results, stages, key, factor, decimals):
    """Mean and standard deviation over the seeds of what the first of these stages that has it
    says; empty if none has."""
    values = []
    for result in results:
        said = [result[stage][key] for stage in stages if key in result.get(stage, {})]
        values += [factor * value for value in said[:1]]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {spread:.{decimals}f}" if spread else mean


def make_speed(rows, chains, made):
    """Its times are those of the whole machine: one seed at a time."""
    scores = []
    for seed, (chain, future) in enumerate(zip(chains, made)):
        future.result()
        run(chain, seed, [SCORE], str(os.cpu_count()), chain)
        scores.append(read_metrics(chain)["score"])
    return {name: [{"score": score[stage]} for score in scores] for name, stage in rows.items()}


def read_table(markdown):
    """-> {(row, column): (mean, spread)} of all tables in a text."""
    found = {}
    titles = None
    for line in markdown.splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")[1:-1]]
        if not cells:
            titles = None
        elif titles is None:
            titles = cells
        for title, text in zip((titles or [])[1:], cells[1:]):
            if re.fullmatch(r"-?[\d.]+( ± [\d.]+)?", text):
                mean, _, spread = text.partition(" ± ")
                found[cells[0], title] = float(mean), float(spread or 0)
    return found


def demo_cells():
    """What the README's table shows: {(figure, preset and model): (value, 0)}, of `make demo`."""
    found = {}
    for preset in "tiny", "toy":
        path = ROOT / "runs" / preset / "metrics.json"
        if path.exists():
            (_, *models), *rows = report.score_table(json.loads(path.read_text()))
            for figure, *texts in rows:
                for model, text in zip(models, texts):
                    if text:
                        found[figure, f"{preset}: {model}"] = float(text.replace(",", "")), 0.0
    return found


def check(out):
    """Prints each cell of the tables in README.md and docs/experiments.md that differs from what
    `make demo` and the tables in `out` say by more than both spreads allow, and each that
    only they have; and per section how many cells there are, and how many there is nothing for.
    -> how many differ"""
    total = 0
    for page in "README.md", "docs/experiments.md":
        for section in (ROOT / page).read_text().split("\n## "):
            said = read_table(section)
            measured = demo_cells() if page == "README.md" else {}
            for name in re.findall("make table-([a-z-]+)", section):
                if (out / f"{name}.md").exists():
                    measured |= read_table((out / f"{name}.md").read_text())
            if not said:
                continue
            differ = 0
            for key in said.keys() & measured.keys():
                (old, old_spread), (new, new_spread) = said[key], measured[key]
                # One seed has no spread; of three, the farthest is 1.16 stds from their mean.
                tolerance = old_spread + (new_spread or old_spread / 2)
                if abs(old - new) > tolerance and "milliseconds" not in key[0]:
                    print(f"{' / '.join(key)}: {old} ± {old_spread} in {page}, {new} ± "
                          f"{new_spread} here")
                    differ += 1
            for key in measured.keys() - said.keys() if page != "README.md" else ():
                print(f"{' / '.join(key)}: only here")
                differ += 1
            nothing = len(said.keys() - measured.keys())
            title = section.splitlines()[0].lstrip("# ")
            print(f"{page}, {title}: {len(said)} cells, {differ} differ, {nothing} have nothing to "
                  "compare with")
            total += differ
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", choices=TABLES, nargs="?")
    p.add_argument("--seeds", type=int, default=3, help="per row (default: 3)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(),
                   help="rows at a time (default: one per core)")
    p.add_argument("--out", type=Path, default=OUT, help="folder (default: runs/tables)")
    p.add_argument("--check", action="store_true",
                   help="only compare README.md and docs/experiments.md with what is in runs/")
    args = p.parse_args()
    if args.check:
        sys.exit(check(args.out) > 0)
    if not args.table:
        p.error("which table?")
    titles, rows = TABLES[args.table]
    out = args.out.resolve()
    threads = str(max(1, os.cpu_count() // args.jobs))
    is_toy = args.table.startswith("toy")  # of one chain, that of `make demo PRESET=toy`
    demo = ROOT / "runs" / ("toy" if is_toy else "tiny")
    chains = [demo if is_toy or not seed else out / "chain" / str(seed)
              for seed in range(args.seeds)]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        stages = [] if is_toy or args.table == "vae" else list(CHAIN)
        made = [pool.submit(run, chain, seed, stages, threads, chain)
                for seed, chain in enumerate(chains)]
        if args.table == "speed":
            results = make_speed(rows, chains, made)
        else:
            futures = {}
            for seed, chain in enumerate(chains):
                for name, commands in rows.items():
                    folder = out / args.table / re.sub(r"\W+", "-", name).strip("-") / str(seed)
                    futures[name, seed] = pool.submit(row, folder, seed, commands, threads, chain,
                                                      made[seed])
            for future in tqdm(as_completed(futures.values()), desc=args.table, total=len(futures)):
                future.result()
            results = {name: [futures[name, seed].result() for seed in range(args.seeds)]
                       for name in rows}
    except (KeyboardInterrupt, RuntimeError) as error:
        pool.shutdown(cancel_futures=True)
        sys.exit(f"{str(error) or 'stopped'}; the same command goes on from here")
    lines = [["", *(title for title, *_ in titles)], ["---"] * (len(titles) + 1)]
    for name, seeds in results.items():
        lines.append([name, *(cell(seeds, *where) for _, *where in titles)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (out / f"{args.table}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
