"""What smaller weights cost: exports a run at each of --weights, samples clips through the saved packages with the
evaluator, and scores them as sample.py does. Prints a table in Markdown; leaves the packages in RUN/weights.

    python tests/compare_weights.py --run runs/tiny --clips 96
"""
import contextlib
import io
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import export_coreml as export
from dit import Latents, text_input
from sample import PRESETS, Model, decode, expected, fixed_features, frechet, load_vae, measure, share
from vae import parse, parser, positive


@torch.no_grad()
def main(argv=None):
    p = parser(__doc__, PRESETS, computes=False)
    p.add_argument("--model", type=Path, help="the few-step student")
    p.add_argument("--vae", type=Path, help="the autoencoder")
    p.add_argument("--latents", type=Path, help="the data set")
    p.add_argument("--clips", type=positive, default=96, help="clips of seen captions; half as many held-out ones")
    args = parse(p, PRESETS, argv, model="student.pt", vae="vae.pt", latents="latents.pt")
    data, vae = Latents(args.latents), load_vae(args.vae, "cpu")
    model = Model(args.model, "cpu", torch.no_grad, None, 1)
    captions = sorted(set(data.captions))
    captions = [captions[i % len(captions)] for i in range(args.clips)]
    held = data.file["held_out_captions"]
    held = [held[i % len(held)] for i in range(args.clips // 2)]
    tokens, noises = text_input(model.checkpoint, captions + held).int(), model.noise(len(captions + held), args.seed)
    real = fixed_features(decode(vae, model.checkpoint, data.x0(data.test), torch.no_grad))
    reference = decode(vae, model.checkpoint, model.sample(tokens, noises), torch.no_grad)

    def row(name, size, clips):
        right, n = measure(clips) == expected(captions + held), len(captions)
        mse = ((clips - reference) / 2).square().mean((1, 2, 3, 4))
        print(f"| {name} | {size / 1e6:.2f} | {share(right[:n].all(1)):.1%} | {share(right[n:].all(1)):.1%} | "
              + " | ".join(f"{share(right[:n, i]):.1%}" for i in range(3))
              + f" | {frechet(real, fixed_features(clips)):.5f} | "
              + ("" if name == "PyTorch" else f"{(-10 * mse.log10()).mean():.1f} | {(-10 * mse.log10()).min():.1f}")
              + " |", flush=True)

    print("| weights | MB | all right | held out | colour | shape | direction | Frechet | PSNR, mean | least |")
    row("PyTorch", 4 * sum(x.numel() for x in [*model.dit.parameters(), *vae.decoder.parameters()]), reference)
    for weights in export.WEIGHTS:
        folder = args.run / "weights" / weights
        folder.mkdir(parents=True, exist_ok=True)
        args.weights, args.chunks, args.ffn_tiles, args.attention_slices = weights, 1, 1, 1
        with contextlib.redirect_stdout(io.StringIO()):
            export.export(args, model.dit, vae, model.checkpoint, tokens[:1], folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        saved = {name: export.read_program(folder / package["file"]) for name, package in manifest["packages"].items()}
        call = export.evaluator(manifest, saved)
        clips = [export.sample_packages(manifest, call, tokens[i:i + 1], noises[:, i:i + 1])
                 for i in range(len(tokens))]
        row(weights, sum(f.stat().st_size for f in folder.rglob("*.*") if f.is_file()), torch.cat(clips) * 2 - 1)


if __name__ == "__main__":
    main()
