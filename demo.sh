#!/usr/bin/env bash
# The whole road on the mini family: build, caption, train three adapters, generate, compare. Run it by `make demo`.
# Killed or run again, it goes on where it stopped (run.resume=true); `rm -r outputs/demo` starts anew.
set -euo pipefail
cd "$(dirname "$0")"

out=outputs/demo
scene=(
    "scene.surface=a white marble table"
    "scene.surroundings=[green leaves]"
    "scene.background=a pink wall"
    "scene.lighting=soft light from the left side"
    "scene.mood=fresh"
)
# the mini base saturates from a guidance scale of 5 on
product=(product=data/products/coffee.png num_images=4 guidance_scale=3.5)

step() {
    printf '\n\033[1m%s\033[0m\n' "$1"
    shift
    printf '  python %s\n' "$*"
    python "$@" run.resume=true
}

started=$SECONDS
step "1/8  build a product dataset from photographs" \
    build_data.py dataset=product source.path=data/products \
    source.license=CC0-1.0 run.dir=$out/dataset
step "2/8  teach Florence-2 to describe scenes and to keep the product to itself" \
    caption_vlm.py experiment=captioner_mini run.dir=$out/captioner
step "3/8  caption the dataset" \
    caption_vlm.py task=caption data.input=$out/dataset captioner.adapter=$out/captioner/export \
    tracking=none run.dir=$out/captioned
step "4/8  train a LoRA" train_lora.py experiment=lora_mini run.dir=$out/lora
step "5/8  train an IP-Adapter" train_ip_adapter.py experiment=ip_adapter_mini run.dir=$out/ip_adapter
step "6/8  train a ControlNet" train_controlnet.py experiment=controlnet_mini run.dir=$out/controlnet
step "7/8  generate: without the adapters, then with all three" \
    generate.py "${product[@]}" "${scene[@]}" shadow=auto run.dir=$out/before
step "     " \
    generate.py "${product[@]}" "${scene[@]}" shadow=auto adapters.lora=$out/lora/export \
    "adapters.controlnets=[$out/controlnet/export]" adapters.ip_adapter=$out/ip_adapter/export baseline=$out/before \
    run.dir=$out/packshots
step "     and once more, a cut-out led by a reference picture alone" \
    generate.py product=data/products/serum.png reference=data/references/yellow_wall.png num_images=2 shadow=auto guidance_scale=3.5 \
    "adapters.controlnets=[$out/controlnet/export]" adapters.ip_adapter=$out/ip_adapter/export \
    run.dir=$out/by_reference
step "8/8  compare" \
    evaluate.py "runs=[$out/before,$out/packshots]" captioner.adapter=$out/captioner/export run.dir=$out/evaluation

printf '\n\033[1mDone in %d min %02d s.\033[0m\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
printf '  packshots:   %s\n' $out/packshots/*-[0-9].png $out/by_reference/*-[0-9].png
printf '  certificate: %s\n' $out/packshots/coffee-0.json
printf '  report:      %s\n' $out/{packshots,by_reference}/report.html "$out/evaluation/report.html (before and after training)"
