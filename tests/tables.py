"""The paper's tables at toy scale: what each compares is trained with several seeds, scored, and printed as Markdown.

    python tests/tables.py prune              # or scores, vae, disc, steps, speed  -> runs/tables/prune.md
    python tests/tables.py prune --seeds 1    # a first look

A row is a command of the six scripts, run in a folder of its own and scored; what it starts from (the four training
scripts at preset tiny) is made once a seed, in runs/tables/chain. Everything resumes. Rows run side by side, each on
one core: on two, that gets a third more done than one row after the other on both. With --jobs 1 a row has all cores,
or the GPU."""
import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from prune import END, label, rect, svg  # noqa: E402

SCORE = "sample.py --score"
PRUNE = "prune.py --mask-steps 50 --steps 80"  # a quarter of the preset's recovery, after all of which rows look alike
SCRATCH = "dit.py --depth 5 --heads 5 --ffn 384"
ALONE = "distill.py --distillation 0 --adversarial 1 --lr 0.001 --discriminator-ahead 20"
# Clips on which 8x32x32 still leaves a grid; steps of the DiT that take about as long as at the other ratios.
LARGE = "vae.py --size 9x128x128 --width 32 --latent-channels 64 --clips 1536 --steps 400 --batch-size 4 --ratio"
RATIOS = {"4x16x16": (192, 150), "8x16x16": (128, 250), "8x32x32": (32, 1000), "8x64x64": (8, 2000)}

# A column: its title, where in metrics.json it stands (one of these stages, the key), a factor, decimals.
TRAINING = ("training, s", ("distill", "prune", "dit"), "seconds", 1, 0)
SCORES = {key: (title, ("score",), key, factor, decimals) for key, title, factor, decimals in (
    ("params", "params, M", 1e-6, 2), ("evaluations", "evaluations", 1, 0), ("seconds_per_clip", "ms a clip", 1e3, 1),
    ("test_loss", "loss on unseen clips", 1, 4), ("text_alignment", "all right, %", 100, 1),
    ("held_out_alignment", "held out, %", 100, 1), ("color", "colour, %", 100, 1), ("shape", "shape, %", 100, 1),
    ("direction", "direction, %", 100, 1), ("subject_consistency", "consistency", 1, 3),
    ("motion_smoothness", "smoothness", 1, 4), ("dynamic_degree", "dynamic, 1e-3", 1e3, 1),
    ("frechet", "Fréchet, 1e-3", 1e3, 2))}


def columns(*keys):
    return [SCORES[key] for key in keys]


# table -> its columns, and its rows: {name: command, or commands}.
TABLES = {
    "scores": (  # known to be worse and worse: taught for less and less time, deaf to the caption
        columns("test_loss", "text_alignment", "held_out_alignment", "color", "shape", "direction",
                "subject_consistency", "motion_smoothness", "dynamic_degree", "frechet"),
        {"teacher, 900 steps": "dit.py",
         **{f"teacher, {steps} steps": f"dit.py --steps {steps}" for steps in (300, 100, 30)},
         "teacher, 900 steps, without the caption": f"{SCORE} --cfg 0"}),
    "vae": (
        [("PSNR, dB", ("vae",), "psnr_db", 1, 1), ("VAE, s", ("vae",), "seconds", 1, 0),
         ("DiT, s", ("dit",), "seconds", 1, 0),
         *columns("text_alignment", "held_out_alignment", "color", "shape", "direction", "subject_consistency",
                  "motion_smoothness", "dynamic_degree", "frechet")],
        {f"{ratio}: {tokens} tokens, {steps:,} steps": [f"{LARGE} {ratio}", f"dit.py --steps {steps}",
                                                        f"{SCORE} --sampling-steps 20"]
         for ratio, (tokens, steps) in RATIOS.items()}),
    "prune": (
        [*columns("params", "test_loss", "text_alignment", "held_out_alignment", "frechet"), TRAINING],
        {"blocks alone, 5 of 7": f"{PRUNE} --blocks 5 --levels blocks",
         "heads alone, 3 of 8": f"{PRUNE} --heads 3 --levels heads",
         "FFN alone, 192 of 512": f"{PRUNE} --ffn 192 --levels ffn",
         "blocks 6, heads 5": f"{PRUNE} --blocks 6 --heads 5 --levels blocks,heads",
         "blocks 6, FFN 312": f"{PRUNE} --blocks 6 --ffn 312 --levels blocks,ffn",
         "heads 5, FFN 384": f"{PRUNE} --heads 5 --ffn 384 --levels heads,ffn",
         "blocks 6, heads 6, FFN 440": f"{PRUNE} --blocks 6 --heads 6 --ffn 440",
         "**5 / 5 / 384: learned masks, both KD**": PRUNE,
         "the same, masks ten times as fast": f"{PRUNE} --mask-lr 0.02",
         "the largest sensitivity": f"{PRUNE} --criterion taylor",
         "the largest weights": f"{PRUNE} --criterion magnitude",
         "chance": f"{PRUNE} --criterion random",
         "learned masks, KD of the output": f"{PRUNE} --kd output",
         "learned masks, KD of the features": f"{PRUNE} --kd features",
         "learned masks, no KD": f"{PRUNE} --kd none",
         "from scratch, as many steps": f"{SCRATCH} --steps 130",
         "**370 steps: learned masks, both KD**": "prune.py",
         "370 steps: chance, both KD": "prune.py --criterion random",
         "370 steps: learned masks, no KD": "prune.py --kd none",
         "370 steps from scratch": f"{SCRATCH} --steps 370",
         "1,270 steps from scratch": f"{SCRATCH} --steps 1270"}),
    "disc": (
        [("told right, %", ("distill",), "told_right", 100, 1),
         *columns("text_alignment", "held_out_alignment", "shape", "subject_consistency", "frechet"), TRAINING],
        {"the pruned model, before any of it": f"{ALONE} --steps 1",
         "**the paper's: 3 frozen blocks, 1 learned**": ALONE,
         "a linear layer on the 3 frozen": f"{ALONE} --learned-blocks 0",
         "a convolution on the 3 frozen": f"{ALONE} --discriminator-head convolution",
         "none frozen, 4 learned from scratch": f"{ALONE} --frozen-blocks 0 --learned-blocks 4",
         "K = 1": f"{ALONE} --frozen-blocks 1",
         "K = 2": f"{ALONE} --frozen-blocks 2",
         "K = 5": f"{ALONE} --frozen-blocks 5",
         "no time conditioning": f"{ALONE} --no-time-conditioning",
         "distillation term, no adversary": "distill.py --adversarial 0",
         "**both** (the preset)": "distill.py"}),
    "steps": (
        columns("evaluations", "text_alignment", "held_out_alignment", "color", "shape", "direction", "frechet"),
        {**{f"student, {n} steps": f"distill.py --sampling-steps {n}" for n in (1, 2, 8)},
         "**student, 4 steps**": "distill.py",
         "student, 2 steps, trained twice as long": "distill.py --sampling-steps 2 --steps 200",
         **{f"teacher, {n} steps, CFG": f"{SCORE} --sampling-steps {n}" for n in (2, 4, 10, 40)},
         **{f"teacher, {n} steps, no CFG": f"{SCORE} --sampling-steps {n} --cfg 1" for n in (4, 8, 20, 40)}}),
    "speed": (
        columns("params", "evaluations", "seconds_per_clip", "text_alignment", "held_out_alignment",
                "subject_consistency", "motion_smoothness", "dynamic_degree", "frechet"),
        {"teacher": "dit", "pruned": "pruned", "student": "student"}),
}
CHAIN = ["vae.py", "dit.py", "prune.py", "distill.py"]
INPUTS = {"vae.py": [], "dit.py": ["latents"], "prune.py": ["latents", "dit"],
          "distill.py": ["latents", "pruned", "teacher"], "sample.py": ["latents", "vae"]}


def run(folder, seed, commands, threads, inputs):
    """Commands, one after the other, with what they say in folder/log; those that are done are skipped. inputs: the
    folder with the files that they start from."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    for command in commands:
        if done.exists() and command in done.read_text().splitlines():
            continue
        script, *flags = command.split()
        for name in INPUTS[script]:
            flags += [f"--{name}", inputs / f"{'dit' if name == 'teacher' else name}.pt"]
        with open(folder / "log", "a") as log:
            status = subprocess.run([sys.executable, ROOT / script, "--run", folder, "--seed", str(seed), *flags],
                                    env=dict(os.environ, OMP_NUM_THREADS=threads), stdout=log, stderr=log).returncode
        if status:
            raise RuntimeError(f"`{command}` ended with status {status}: see {folder / 'log'}")
        with open(done, "a") as file:
            file.write(command + "\n")


def row(folder, seed, commands, threads, chain, made):
    """-> the metrics of a row with one seed; made: a future, done when the chain is."""
    made.result()
    if isinstance(commands, list):  # its own data and autoencoder
        run(folder, seed, commands, threads, folder)
        metrics = json.loads((folder / "metrics.json").read_text())
    else:
        own = commands in CHAIN  # without a flag it is the chain's own; scoring alone is the chain's teacher's
        if own or commands.startswith(SCORE):
            file = {"prune.py": "pruned.pt", "distill.py": "student.pt"}.get(commands, "dit.pt")
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / file).exists():
                (folder / file).symlink_to(chain / file)
        run(folder, seed, [commands] * (not own) + [SCORE] * (not commands.startswith(SCORE)), threads, chain)
        metrics = json.loads((folder / "metrics.json").read_text())
        if own:
            stage = Path(commands).stem
            metrics[stage] = json.loads((chain / "metrics.json").read_text())[stage]
    return {**metrics, "score": metrics["score"].popitem()[1]}  # of the one checkpoint that this folder has


def cell(results, stages, key, factor, decimals):
    """Mean and standard deviation over the seeds of what one of these stages has noted; empty if none has."""
    noted = [[result[stage][key] for stage in stages if key in result.get(stage, {})] for result in results]
    values = [factor * values[0] for values in noted if values]
    spread = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.{decimals}f}{f' ± {spread:.{decimals}f}' if spread else ''}" if values else ""


def against_evaluations(results):
    """An SVG: what share of the clips is all right against how many network evaluations a clip takes, on a log axis."""
    lines = {"student": "#4c8bf5", "teacher, CFG": "#e0823d", "teacher, no CFG": "#808890"}
    parts = [label(0, 12, "clips that are all right, %"), label(360, 192, "evaluations a clip", END)]
    parts += [label(22, 164 - 1.4 * y, y, END) + rect(28, 160 - 1.4 * y, 330, 0.5, 'opacity=".4"')
              for y in (0, 25, 50, 75, 100)]
    parts += [label(30 + 46 * i, 178, 2 ** i) for i in range(7)]
    for i, (line, color) in enumerate(lines.items()):
        points = []
        for name, seeds in results.items():
            if re.sub(r"\W*\d+ steps?\W*", ", ", name).strip("*, ") == line:
                scores = [result["score"] for result in seeds]
                x, y = (statistics.mean(score[key] for score in scores) for key in ("evaluations", "text_alignment"))
                points.append((30 + 46 * math.log2(x), 160 - 140 * y))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(points))
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" stroke="none"/>' for x, y in points)
        parts.append(f'<g fill="{color}">{dots}{label(240, 116 + 15 * i, line)}</g>'
                     f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
    return svg(196, *parts)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", choices=TABLES)
    p.add_argument("--seeds", type=int, default=3, help="how often each row is trained (default: 3)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time (default: one a core)")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "tables", help="folder (default: runs/tables)")
    args = p.parse_args()
    titles, rows = TABLES[args.table]
    seeds, out, threads = range(args.seeds), args.out.resolve(), str(max(1, os.cpu_count() // args.jobs))
    chains, pool = [out / "chain" / str(seed) for seed in seeds], ThreadPoolExecutor(args.jobs)

    try:
        stages = CHAIN if args.table != "vae" else []
        made = [pool.submit(run, chain, seed, stages, threads, chain) for seed, chain in zip(seeds, chains)]
        if args.table == "speed":  # its times are those of the whole machine: one at a time
            [future.result() for future in made]
            for seed, chain in zip(seeds, chains):
                run(chain, seed, [SCORE], str(os.cpu_count()), chain)
            scores = [json.loads((chain / "metrics.json").read_text())["score"] for chain in chains]
            results = {name: [{"score": score[stage]} for score in scores] for name, stage in rows.items()}
        else:
            folders = {name: out / args.table / re.sub(r"\W+", "-", name).strip("-") for name in rows}
            futures = {(name, seed): pool.submit(row, folders[name] / str(seed), seed, rows[name], threads,
                                                 chains[seed], made[seed]) for seed in seeds for name in rows}
            for future in tqdm(as_completed(futures.values()), desc=args.table, total=len(futures)):
                future.result()
            results = {name: [futures[name, seed].result() for seed in seeds] for name in rows}
    except (KeyboardInterrupt, RuntimeError) as error:
        pool.shutdown(cancel_futures=True)
        sys.exit(f"{str(error) or 'stopped'}; the same command goes on from here")
    lines = [["", *(title for title, *_ in titles)], ["---"] * (len(titles) + 1)]
    lines += [[name, *(cell(seeds, *where) for _, *where in titles)] for name, seeds in results.items()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (out / f"{args.table}.md").write_text(table)
    if args.table == "steps":
        (out / "steps.svg").write_text(against_evaluations(results))
    print(table)


if __name__ == "__main__":
    main()
