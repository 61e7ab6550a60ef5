"""Prompts in, videos out; the scores of every checkpoint; a page that shows what each stage does.

The paper reports VBench (https://arxiv.org/abs/2311.17982). Three of its dimensions keep their
names here, but each is a plain formula: the data is rendered, so a clip can be measured instead of
shown to another network.

    text alignment        share of clips with colour (by palette), shape (by template) and direction
                          (by centroid) all as the caption says; of real videos, the share whose
                          nearest training clip, by latents, carries the caption
    unseen combinations   the same, on combinations that no stage was trained on
    subject consistency   cosine similarity of each frame's subject with the first frame's
    motion smoothness     1 - mean distance of a frame from the mean of its neighbours
    dynamic degree        mean difference of neighbouring frames, pixels in [0, 1]
    outline IoU           overlap of the subject with the ideal outline of the shape asked for
    Frechet distance      from VAE reconstructions of test clips, on the features of a fixed random
                          network; lower is better

A student samples without guidance in its own few steps, unless --prompt comes with
--sampling-steps; dit.pt and pruned.pt take --sampling-steps Euler steps with --cfg.

    python sample.py --prompt "a red circle moving left" --out red.mp4   # or .gif, .png
    python sample.py --score        # every checkpoint of the run -> metrics.json
    python sample.py --report       # -> report.html, compare.gif, path.png
"""
import json
import math
import time
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from common import cli, data, files, report, training
from distill import sample_student, student_timesteps
from dit import CFG_SCALE, TEACHER_STEPS, flow_loss, load_dit, logit_normal, sample_euler
from vae import PRESETS as VAE_PRESETS
from vae import latent_size, load_vae

# ------------------------------------------------------------ sampling


class Model:
    """A checkpoint of dit.py, prune.py or distill.py, ready to sample. steps: None means 40 for a
    teacher or pruned model, and for a student the levels of its checkpoint."""

    def __init__(self, path, device, precision, steps, cfg):
        self.dit, self.checkpoint = load_dit(path, device, *report.NAMES)
        self.device = device
        self.precision = precision
        self.cfg = cfg
        with files.reading(path):
            self.latent_shape = self.checkpoint["latent_shape"]
            self.fps = self.checkpoint["fps"]  # of the training clips
        self.stage = self.checkpoint["stage"]
        self.name = report.NAMES[self.stage]
        self.timesteps = self.checkpoint.get("timesteps")
        self.is_student = self.stage == "student"
        if self.is_student and steps:
            self.timesteps = student_timesteps(steps)
        self.steps = len(self.timesteps) if self.is_student else steps or TEACHER_STEPS

    @property
    def nfe(self):
        """Function evaluations per clip: one per step of a student; of the others two, with and
        without the caption (2 x 40 = 80), unless --cfg is 1. A test counts them."""
        return self.steps if self.is_student or self.cfg == 1 else 2 * self.steps

    def noise(self, n, seed):
        """[steps, n, c, t, h, w]. Clip i's noise depends on seed + i alone."""
        clips = []
        for i in range(n):
            g = torch.Generator().manual_seed(seed + i)
            # Step by step, so that the first step's is the same for every number of steps.
            clips.append(torch.stack([torch.randn(self.latent_shape, generator=g)
                                      for _ in range(self.steps if self.is_student else 1)]))
        return torch.stack(clips, dim=1).to(self.device)

    def trajectory(self, prompts, noise):
        """Yields t, x_t and x0 of every step, [b, c, t, h, w]; the last x0 is the sample."""
        if self.is_student:
            steps = sample_student(self.dit, noise, prompts, self.timesteps)
        else:
            steps = sample_euler(self.dit, noise[0], prompts, self.steps, self.cfg)
        with self.precision():  # around the iteration: that is when the model runs
            yield from steps

    def sample(self, prompts, seed, batch=16):
        """-> normalised latents [n, c, t, h, w] on the CPU, and the median over batches of seconds
        per clip. prompts: what the text encoder reads, [n, m] or [n, m, dim]."""
        n = len(prompts)
        prompts = prompts.to(self.device)
        noise = self.noise(n, seed)
        x0 = []
        seconds = []
        for i in cli.progress(range(0, n, batch), desc=f"{self.name}, {n} clips"):
            start = time.perf_counter()
            for _, _, step_x0 in self.trajectory(prompts[i:i + batch], noise[:, i:i + batch]):
                latents = step_x0  # the last step's is the sample
            x0.append(latents.cpu())  # waits for the device
            seconds.append((time.perf_counter() - start) / len(latents))
        return torch.cat(x0), float(np.median(seconds))


@torch.no_grad()
def decode(vae, x0, precision, batch=8):
    """Normalised latents -> clips [b, 3, t, h, w] in [-1, 1], on the CPU; a few at a time, since
    decoded clips are large."""
    clips = []
    for latents in x0.split(batch):
        z = latents.to(vae.latent_mean.device) * vae.latent_std + vae.latent_mean
        with precision():
            clips.append(vae.decode(z).float().clamp(-1, 1).cpu())
    return torch.cat(clips)


def models_of(args, latents, device, precision):
    """The checkpoints that the run has. --sampling-steps is not for a student: it learned its
    own."""
    for stage in report.NAMES:
        path = args.run / f"{stage}.pt"
        if path.exists():
            steps = None if stage == "student" else args.sampling_steps
            model = Model(path, device, precision, steps, args.cfg)
            files.check_settings(path, model.checkpoint["settings"],
                                 dict(latents_checksum=latents.checksum))
            yield model
        else:
            cli.warn(f"{path} is not there, so left out")


# ------------------------------------------------------------ measuring clips


def subject_mask(clips):
    """How much each pixel belongs to the subject, [b, t, h, w]: its colourfulness, since
    backgrounds are grey."""
    chroma = (clips.amax(1) - clips.amin(1)) / 1.6  # 1.6: the palette's own, in [-1, 1]
    return torch.where(chroma > 0.25, chroma.clamp(max=1), 0)


def centroids(mask):
    """[b, t, h, w] -> the subject's centre [b, t, 2] as (x, y) and its area [b, t], in pixels."""
    h, w = mask.shape[-2:]
    area = mask.sum((2, 3))
    x = (mask.sum(2) * (torch.arange(w) + 0.5)).sum(-1)
    y = (mask.sum(3) * (torch.arange(h) + 0.5)).sum(-1)
    return torch.stack([x, y], dim=-1) / (area + 1e-6)[..., None], area


def centred(images, mask, pixels=24):
    """Each frame's subject, moved to the middle and scaled to one area: images [b, c, t, h, w],
    mask [b, t, h, w] -> [b, t, c * pixels * pixels]."""
    centre, area = centroids(mask)
    # Half the side of the window, which is as large as four subjects: [b, t, 1, 1, 1].
    half_side = area.clamp(min=4).sqrt()[..., None, None, None]
    ticks = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    offsets = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    position = centre[..., None, None, :] + offsets * half_side  # [b, t, pixels, pixels, 2]
    grid = position / torch.tensor([mask.shape[3], mask.shape[2]]) * 2 - 1
    frames = rearrange(images, "b c t h w -> (b t) c h w")
    crops = F.grid_sample(frames, grid.flatten(0, 1), align_corners=False)
    return rearrange(crops, "(b t) c h w -> b t (c h w)", b=len(mask))


def measure(clips):
    """What a clip of `shapes` shows: indices (colour, shape, direction) [b, 3], -1 where nothing
    can be seen. clips: [b, 3, t, h, w] in [-1, 1]."""
    mask = subject_mask(clips)
    centre, area = centroids(mask)
    weight = mask / (mask.sum((1, 2, 3), keepdim=True) + 1e-6)
    mean_color = (clips * weight[:, None]).sum((2, 3, 4))
    palette = torch.tensor(list(data.COLORS.values())) * 2 - 1
    color = torch.cdist(mean_color, palette).argmin(1)

    # Templates as large as the data's shapes and a little blurred, as an autoencoder's edges are.
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    shapes = torch.stack([data.shape_coverage(shape, x, y, torch.tensor(6.0))
                          for shape in data.SHAPES])[:, None]  # [shapes, 1, h, w]
    shapes = F.avg_pool2d(F.avg_pool2d(shapes, 3, 1, 1), 3, 1, 1)
    templates = centred(shapes[:, None], shapes)  # [shapes, 1, pixels * pixels]
    crops = centred(mask[:, None], mask).mean(1, keepdim=True)  # [b, 1, pixels * pixels]
    templates = templates - templates.mean(-1, keepdim=True)
    crops = crops - crops.mean(-1, keepdim=True)
    shape = F.cosine_similarity(crops, templates.transpose(0, 1), dim=-1).argmax(1)  # [b]

    third = max(1, clips.shape[2] // 3)
    travel = centre[:, -third:].mean(1) - centre[:, :third].mean(1)
    headings = torch.tensor(list(data.DIRECTIONS.values())).float()
    moves = travel.norm(dim=1) > 0.05 * min(clips.shape[3:])
    direction = torch.where(moves, (travel @ headings.T).argmax(1), -1)
    is_visible = (area.amin(1) > 4)[:, None]
    return torch.where(is_visible, torch.stack([color, shape, direction], dim=1), -1)


def outline_iou(clips, captions):
    """How well the subject fills the outline that the caption asks for: intersection over union
    with the ideal shape where that fits best, mean over frames. clips: [b, 3, t, h, w] of `shapes`
    -> [b] in [0, 1]"""
    mask = subject_mask(clips)
    h, w = mask.shape[2:]
    asked = [data.words(caption)[2] for caption in captions]  # "a COLOUR SHAPE moving DIRECTION"
    x = torch.arange(w) + 0.5
    y = (torch.arange(h) + 0.5)[:, None]

    def overlap(fit):
        """fit: (x, y, radius) [b, t, 3] -> [b, t]"""
        shape_x, shape_y, radius = fit[..., None, None].unbind(2)  # each [b, t, 1, 1]
        ideal = torch.stack([data.shape_coverage(*each) for each in
                             zip(asked, x - shape_x, y - shape_y, radius)])
        union = torch.maximum(mask, ideal).sum((2, 3))
        return torch.minimum(mask, ideal).sum((2, 3)) / (union + 1e-6)

    # Start from the centroid and about the right size; then take every step that fits better:
    # to the right, down, larger, and back.
    centre, area = centroids(mask)
    radius = (area / 2).sqrt().clamp(min=1)
    fit = torch.cat([centre, radius[..., None]], dim=-1)
    best = overlap(fit)
    for step in (0.2, 0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02):  # of the radius
        for move in [*torch.eye(3), *-torch.eye(3)]:
            candidate = fit + step * move * fit[..., 2:]
            new = overlap(candidate)
            fit = torch.where((new > best)[..., None], candidate, fit)
            best = torch.maximum(new, best)
    return best.mean(1)


def nearest_captions(x0, latents, piece=4096):
    """Of each clip the caption of the nearest training clip, by distance of latents."""
    distances = []
    for known in latents.train.split(piece):
        distances.append(torch.cdist(x0.flatten(1), latents.x0(known).flatten(1)))
    nearest = latents.train[torch.cat(distances, dim=1).argmin(1)]
    return [latents.records[i].caption for i in nearest]


def evaluate_attributes(captions, clips, x0, latents):
    """What each clip shows of what its caption asks for: one dict per clip, {attribute: (whether
    the prediction is right, the prediction)}."""
    predictions = []
    if latents.on_shapes:
        attributes = {"color": data.COLORS, "shape": data.SHAPES, "direction": data.DIRECTIONS}
        for indices, caption in zip(measure(clips).tolist(), captions):
            prediction = {}
            for (attribute, names), index in zip(attributes.items(), indices):
                shown = [*names, "none"][index]  # -1 is none
                prediction[attribute] = (shown in data.words(caption), shown)
            predictions.append(prediction)
    else:
        for shown, caption in zip(nearest_captions(x0, latents), captions):
            predictions.append({"nearest training clip": (shown == caption, shown)})
    return predictions


def motion_scores(clips, on_shapes):
    """Subject consistency (of real videos: of the whole frame), motion smoothness and dynamic
    degree, means over clips [b, 3, t, h, w] in [-1, 1]; none of fewer than three frames."""
    frames = clips / 2 + 0.5
    if frames.shape[2] < 3:
        return {}
    if on_shapes:
        subject = centred(frames, subject_mask(clips))  # [b, t, values]
    else:
        subject = rearrange(frames, "b c t h w -> b t (c h w)")
    similarity = F.cosine_similarity(subject[:, 1:], subject[:, :1], dim=-1)
    change = (frames[:, :, 1:] - frames[:, :, :-1]).abs()
    neighbours = (frames[:, :, 2:] + frames[:, :, :-2]) / 2
    distance = (frames[:, :, 1:-1] - neighbours).abs()
    return dict(subject_consistency=similarity.mean().item(), dynamic_degree=change.mean().item(),
                motion_smoothness=1 - distance.mean().item())


def fixed_features(clips):
    """[b, 3, t, h, w] -> [b, 64]: means and stds of a small convolution network that nobody
    trained. Its first filters sum to zero, so that it looks at edges and motion: with brightness in
    it, blur would hardly show."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(16, 3, 3, 3, 3, generator=g) / 9
    second = torch.randn(32, 16, 3, 3, 3, generator=g) / 20
    first = first - first.mean((2, 3, 4), keepdim=True)
    clips = F.pad(clips, (1,) * 6, mode="replicate")  # zeros would be edges
    x = F.relu(F.conv3d(clips, first, stride=(1, 2, 2)))
    x = F.relu(F.conv3d(x, second, stride=2, padding=1)).flatten(2)
    return torch.cat([x.mean(2), x.std(2)], dim=1)


def frechet(a, b):
    """Frechet distance of two sets of features [n, d], each seen as a Gaussian (FID,
    https://arxiv.org/abs/1706.08500). It depends on both n: compare only distances between sets of
    the same sizes."""
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T)
    cov_b = torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    return distance.item()


@torch.no_grad()
def validation_loss(dit, latents, device, precision, batch=64):
    """The flow-matching loss on clips that no stage was trained on, always with the same noise: it
    tells models apart whose clips are equally right. At levels of mean logit 0 whatever
    --noise-level was."""
    losses = []
    for start in cli.progress(range(0, len(latents.test), batch), desc="validation"):
        picked = latents.test[start:start + batch]
        g = torch.Generator().manual_seed(start)
        x0 = latents.x0(picked)
        prompts = latents.prompts_of([latents.records[i].caption for i in picked])
        noise = torch.randn(x0.shape, generator=g)
        t = logit_normal(len(picked), g)
        inputs = [x.to(device) for x in (x0, prompts, noise, t)]
        with precision():
            loss = flow_loss(dit, *inputs)
        losses += [loss.item()] * len(picked)  # the mean is over clips, not batches
    return float(np.mean(losses))


# ------------------------------------------------------------ the scores of a run


@torch.no_grad()
def score_clips(x0, captions, latents, vae, precision, batch=32):
    """x0: normalised latents. -> one dict of scores per clip, and their features [n, 64]. In
    batches: decoded clips are large."""
    rows = []
    features = []
    for start in range(0, len(x0), batch):
        part = x0[start:start + batch]
        asked = captions[start:start + batch]
        clips = decode(vae, part, precision)
        features.append(fixed_features(clips))
        predictions = evaluate_attributes(asked, clips, part, latents)
        for clip, caption, prediction in zip(clips.split(1), asked, predictions):
            row = {attribute: float(right) for attribute, (right, _) in prediction.items()}
            row["text_alignment"] = min(row.values())  # all of them right
            if latents.on_shapes:
                row["outline_iou"] = outline_iou(clip, [caption]).item()
            rows.append(row | motion_scores(clip, latents.on_shapes))
    return rows, torch.cat(features)


def pick_evenly(captions, n):
    """n of them, evenly; some twice, or more often, if there are fewer."""
    return [captions[i * len(captions) // n] for i in range(n)] if captions else []


def mean_scores(rows):
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def score(args, latents, vae, models, precision):
    """Every checkpoint of the run on the same prompts and noise, half as many unseen prompts as
    seen ones; and training clips through the VAE alone: about what a perfect generator would score,
    but for the Frechet distance, since none of these shows an unseen combination."""
    if not models:
        cli.exit_with_error(f"nothing to score in {args.run}: dit.py makes the first checkpoint")
    seen = pick_evenly(latents.metadata["captions"], args.score)
    unseen = pick_evenly(latents.metadata["held_out_captions"], args.score // 2)
    reference = latents.test if len(latents.test) > 1 else latents.train[:256]
    real = []
    for picked in reference.split(32):
        real.append(fixed_features(decode(vae, latents.x0(picked), precision)))
    real = torch.cat(real)
    scores = {}
    for model in models:
        x0, seconds = model.sample(latents.prompts_of(seen + unseen), args.seed)
        rows, features = score_clips(x0, seen + unseen, latents, vae, precision)
        result = dict(params=training.count_parameters(model.dit), nfe=model.nfe,
                      seconds_per_clip=seconds,
                      model_checksum=files.checksum(model.dit.parameters()))
        result |= mean_scores(rows[:len(seen)])
        if unseen:
            result["held_out_alignment"] = mean_scores(rows[len(seen):])["text_alignment"]
        if not model.is_student:  # a student jumps; it has no flow
            result["validation_loss"] = validation_loss(model.dit, latents, model.device, precision)
        # The Frechet distance is over seen and unseen clips together.
        scores[model.stage] = result | dict(frechet=frechet(features, real), clips=len(seen))
    files.record_metrics(args.run, "score", scores)
    if latents.on_shapes:
        picked = latents.train[:len(seen + unseen)]
        captions = [latents.records[i].caption for i in picked]
        rows, features = score_clips(latents.x0(picked), captions, latents, vae, precision)
        result = mean_scores(rows) | dict(frechet=frechet(features, real), clips=len(picked))
        files.record_metrics(args.run, "data", result)
    for name, *cells in report.score_table(files.read_metrics(args.run)):
        print(name.ljust(28), *(text.rjust(9) for text in cells))
    print(f"{args.run / 'metrics.json'}: scores; next: export_coreml.py")


# ------------------------------------------------------------ the report


def input_clips(latents, indices):
    """The clips of the data set behind these latents; None if their frames have gone."""
    path = latents.path.with_name("frames.pt")
    are_there = path.exists() and path.with_suffix(".bin").exists()
    if not (latents.on_shapes or are_there):
        return None
    return data.open_clips(latents.checkpoint["settings"], path).clip(indices)


def side_by_side(args, latents, vae, models, captions, precision):
    """compare.gif: a row per prompt, a column per stage."""
    # A later record replaces an earlier one, and test clips come last.
    index = {latents.records[i].caption: i for i in [*latents.train, *latents.test]}
    indices = [index[caption].item() for caption in captions]
    real = latents.x0(indices)
    columns = {"reconstruction": (decode(vae, real, precision), real)}
    clips = input_clips(latents, indices)
    if clips is not None:
        columns = {"input": (clips, real)} | columns
    for model in models:
        x0, _ = model.sample(latents.prompts_of(captions), args.seed)
        columns[model.name] = decode(vae, x0, precision), x0
    rows = [[] for _ in captions]
    for name, (clips, x0) in columns.items():
        predictions = evaluate_attributes(captions, clips, x0, latents)
        for row, caption, clip, prediction in zip(rows, captions, clips, predictions):
            is_right = all(right for right, _ in prediction.values())
            shown = " ".join(text for _, text in prediction.values())
            row.append(report.cell(clip, f"{name}: {caption}", (is_right, shown), width=160))
    path = args.run / "compare.gif"
    fps = written_fps(args, latents.metadata["fps"], path)
    return report.figure(path, rows, fps, "clips, a row per prompt")


def from_noise(args, latents, vae, models, caption, precision):
    """path.png: x_t, and the x0 that the network sees in it, at up to eight steps of a sampling."""
    rows = []
    for model in models:
        prompts = latents.prompts_of([caption]).to(model.device)
        steps = list(model.trajectory(prompts, model.noise(1, args.seed)))
        row = []
        for i in np.unique(np.linspace(0, len(steps) - 1, 8).round().astype(int)):
            t, x_t, x0 = steps[i]
            both = torch.cat(list(decode(vae, torch.cat([x_t, x0]), precision)), dim=2)
            middle = both[:, both.shape[1] // 2][:, None]  # one above the other
            title = f"{model.name} step {i + 1}, t={float(t):.2f}"
            row.append(report.cell(middle, title, width=96))
        blank = np.full_like(row[0], 255)
        rows.append(row + [blank] * (8 - len(row)))
    return report.figure(args.run / "path.png", rows, 1, "x_t above x0, a column per step")


def stale_scores(models, metrics):
    """-> a sentence for the report: which scores are of weights that are no longer there."""
    stale = []
    for model in models:
        scores = metrics.get("score", {}).get(model.stage)
        if scores and scores.get("model_checksum") != files.checksum(model.dit.parameters()):
            stale.append(model.name)
    if not stale:
        return ""
    return f"Stale, measured before it was trained anew: {', '.join(stale)}; run sample.py --score."


def masks_and_curves(run):
    """-> the map of masks, the curves of all losses, both as HTML, and the files that are not
    there."""
    masks = ""
    curves = ""
    missing = []
    for name in "vae", "dit", "masks", "pruned", "student":
        path = run / f"{name}.pt"
        if not path.exists():
            missing.append(path.name)
            continue
        checkpoint = files.load(path, name)
        with files.reading(path):
            if name == "masks":
                masks = report.mask_map(checkpoint["masks"])
                continue
            for key, values in checkpoint["history"].items():
                curves += report.curve(f"{name}: {key.replace('_', ' ')}", values)
    return masks, curves, missing


def write_report(args, latents, vae, models, precision):
    """Writes report.html, one file that needs no other, and the pictures in it. What the run does
    not have is left out with a word."""
    seen = latents.metadata["captions"]
    unseen = latents.metadata["held_out_captions"]
    unseen = unseen[::max(1, len(unseen) // 2)][:2]
    captions = [seen[37 * i % len(seen)] for i in range(4)]  # 37 spreads over all attributes
    captions = list(dict.fromkeys([*captions, *unseen]))
    masks, curves, missing = masks_and_curves(args.run)
    metrics = files.read_metrics(args.run)
    with files.reading(args.run / "metrics.json"):
        table = "".join("<tr><td>" + "<td>".join(row) for row in report.score_table(metrics))
        stale = stale_scores(models, metrics)
        # Four digits are enough to read.
        metrics = json.loads(json.dumps(metrics), parse_float=lambda x: float(f"{float(x):.4g}"))
    compare = side_by_side(args, latents, vae, models, captions, precision)
    trajectories = ""
    shown = [model for model in models if model.stage != "pruned"]
    if shown:
        trajectories = from_noise(args, latents, vae, shown, captions[-1], precision)
    clip_size = latents.checkpoint["config"]["size"]
    report.write_page(
        args.run / "report.html", run=escape(str(args.run)),
        size="×".join(str(n) for n in clip_size), compare=compare, caption=escape(captions[-1]),
        left_out=f"Left out, since it is not there: {', '.join(missing)}." if missing else "",
        unseen=escape("; ".join(unseen) or "none of them"), masks=masks, table=table, stale=stale,
        trajectories=trajectories, curves=curves, metrics=escape(json.dumps(metrics, indent=1)))
    print(f"open {args.run / 'report.html'}")


# ------------------------------------------------------------ the command line


def read_prompts(args, checkpoint):
    """What the text encoder reads for --prompt: [prompts, m] or [prompts, m, dim]."""
    m = checkpoint["text_tokens"]
    dim = checkpoint["config"]["text_dim"]
    is_array = args.embedding and args.embedding.suffix == ".npy" and args.embedding.is_file()
    if args.embedding and not (dim and is_array):
        cli.exit_with_error(
            f"--embedding {args.embedding} is no .npy file, or {args.model} reads token ids")
    if not dim:
        return data.tokenize(args.prompt, checkpoint["vocabulary"], m)
    if args.embedding is None:
        return data.Latents(args.latents).prompts_of(args.prompt)
    with files.reading(args.embedding):
        embedding = data.read_embedding(args.embedding)
    if len(embedding) > m or embedding.shape[1] != dim:
        cli.exit_with_error(f"{args.embedding} is {list(embedding.shape)}: the model takes up to "
                            f"{m} tokens of {dim} channels")
    padded = F.pad(embedding, (0, 0, 0, m - len(embedding)))
    return padded.expand(len(args.prompt), -1, -1)


def written_fps(args, trained_fps, path):
    """-> frames per second of what is written to `path`: --fps, or that of the training clips."""
    fps = args.fps or trained_fps
    if path.suffix == ".gif" and fps > 50:
        cli.exit_with_error(f"--fps {fps}: browsers show a gif of more than 50 frames per second "
                            "at 10; take fewer, or an mp4")
    return fps


def make_clips(args, device, precision):
    """--prompt: one clip each."""
    model = Model(args.model, device, precision, args.sampling_steps, args.cfg)
    fps = written_fps(args, model.fps, args.out)
    vae = load_vae(args.vae, device, model.checkpoint["vae_checksum"])
    channels, frames, height, width = model.latent_shape
    rt, rs, _ = vae.config["ratio"]
    clip_size = args.size or (1 + (frames - 1) * rt, height * rs, width * rs)
    if args.frames:
        clip_size = args.frames, *clip_size[1:]
    model.latent_shape = channels, *latent_size(clip_size, vae.config["ratio"])
    x0, _ = model.sample(read_prompts(args, model.checkpoint), args.seed)
    clips = decode(vae, x0, precision)
    cells = [report.cell(clip, prompt) for clip, prompt in zip(clips, args.prompt)]
    columns = 1 if args.out.suffix == ".png" else math.ceil(math.sqrt(len(cells)))
    while len(cells) % columns:
        cells.append(np.full_like(cells[0], 255))
    rows = [cells[i:i + columns] for i in range(0, len(cells), columns)]
    report.write_video(args.out, rows, fps)
    print(f"{args.out}: {len(clips)} clip(s) by {args.model}, {model.nfe} function evaluations "
          "per clip")


def parse_arguments(argv):
    p = cli.make_parser(__doc__, dict.fromkeys(VAE_PRESETS, {}), argv)
    p.add_argument("--prompt", action="append", default=[],
                   help="what to show, in words of the training captions; may be repeated")
    p.add_argument("--embedding", type=Path, metavar="FILE",
                   help="name.npy, the prompt's text embedding, if the model was trained on such")
    p.add_argument("--size", type=cli.size, metavar="TxHxW",
                   help="frames x height x width of --prompt's clips (default: as trained)")
    p.add_argument("--frames", type=cli.positive,
                   help="frames of --prompt's clips, in place of --size's; 1: a picture")
    p.add_argument("--sampling-steps", type=cli.positive,
                   help="steps per clip; --score and --report leave a student its own (default: a "
                        "student's own, 40 for the others)")
    p.add_argument("--cfg", type=cli.number(0), default=CFG_SCALE,
                   help="classifier-free guidance scale of dit.pt and pruned.pt; 1: none; 0: the "
                        "caption is ignored")
    p.add_argument("--fps", type=cli.positive,
                   help="frames per second of what is written (default: as vae.py --fps)")
    p.add_argument("--score", type=cli.number(2, kind=int), nargs="?", const=96, metavar="CLIPS",
                   help="score this many clips of every checkpoint of the run (default: 96)")
    p.add_argument("--report", action="store_true", help="write report.html and its pictures")
    cli.add_file(p, "--model", "student.pt",
                 "checkpoint to sample from: dit.pt, pruned.pt, student.pt")
    cli.add_file(p, "--vae", "vae.pt", "the autoencoder, from vae.py")
    cli.add_file(p, "--latents", "latents.pt", "the data set, from vae.py, where it is needed")
    cli.add_file(p, "--out", "sample.mp4", "an mp4, a gif, or a png with all frames")
    cli.add_device_flags(p)
    args = p.parse_args(argv)
    if not (args.prompt or args.score or args.report):
        cli.exit_with_error(
            'nothing to do: give --prompt "a red circle moving left", --score or --report')
    if args.out.suffix not in (".mp4", ".gif", ".png"):
        cli.exit_with_error(f"--out {args.out}: the name must end in .mp4, .gif or .png")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    device, precision = training.set_up(args)
    if args.prompt:
        make_clips(args, device, precision)
    if args.score or args.report:
        latents = data.Latents(args.latents)
        vae = load_vae(args.vae, device, latents.metadata["vae_checksum"])
        models = list(models_of(args, latents, device, precision))
        if args.score:
            score(args, latents, vae, models, precision)
        if args.report:
            write_report(args, latents, vae, models, precision)


if __name__ == "__main__":
    cli.run_script(main)
