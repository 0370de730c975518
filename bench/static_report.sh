#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What kernels do, without a GPU, as a table: counters of a simulator, which executes their PTX, and
# what their machine code says of the main loop. No number is a time.
#   QEFT_CUDASIM_DIR=... QEFT_SASS_REPORT=.../sass_report.py bench/static_report.sh
# QEFT_CUDASIM_DIR is the simulator's source or a build of it. nvcc and nvdisasm must be found. With
# QEFT_MARLIN=.../marlin_cuda_kernel.cu Marlin's kernel is read in the same way.
set -euo pipefail
root=$(realpath -- "$(dirname -- "$0")/..")
: "${QEFT_CUDASIM_DIR:?names the simulator}" "${QEFT_SASS_REPORT:?names sass_report.py}"
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
sim=$QEFT_CUDASIM_DIR
if [ ! -x "$sim/bin/cudasim" ]; then
  sh "$sim/build.sh" "$scratch/cudasim" >/dev/null
  sim=$scratch/cudasim
fi

oc=4096 ic=4096 group=128 k=128
"$nvcc" -std=c++17 -gencode arch=compute_80,code=compute_80 \
  -gencode arch=compute_90a,code=compute_90a -cudart shared --compress-mode=none \
  -I"$root/include" -o "$scratch/probe" "$root/bench/static_probe.cu"

echo "Executed, $oc x $ic, g = $group, k = $k, FP16, compiled for and run on each compute capability:"
echo
echo "| capability | bits | tokens | warps of a block | warp instructions per 32 weights | unique bytes : layer | bytes of requested sectors : layer | sector efficiency | bank conflicts, loads | blocks of a cluster |"
echo "|---|---|---|---|---|---|---|---|---|---|"
for cc in 80 90; do
  for bits in 4 3; do
    for tokens in 1 8 16; do
      layer=$(CUDASIM_CC=$cc CUDASIM_STATS=$scratch/stats "$sim/bin/cudasim" run "$scratch/probe" \
        $oc $ic $bits $group $k $tokens tail)
      python3 - "$scratch/stats" $cc $bits $tokens "$layer" $((oc * ic)) <<'P'
import json, sys
path, cc, bits, tokens, layer, weights = sys.argv[1], *map(int, sys.argv[2:])
for line in open(path):
    j = json.loads(line)
    if "few_tokens" not in j["kernel"]:
        continue
    g, b, s = j["global_load"], j["bulk_load"], j["shared_load"]
    # A copy to all blocks of a cluster is requested once.
    cluster = b["shared_bytes"] // b["bytes"] if b["bytes"] else 1
    print(f"| {cc / 10} | {bits} | {tokens} | {j['block'][0] // 32} "
          f"| {j['warp_instructions'] / (weights / 32):.2f} "
          f"| {(g['unique_bytes'] + b['unique_bytes']) / layer:.3f} "
          f"| {32 * (g['sectors'] + b['sectors']) / layer:.3f} "
          f"| {g['sector_efficiency']:.2f} | {s['wavefronts'] - s['ideal_wavefronts']} | {cluster} |")
P
      rm -f "$scratch/stats"
    done
  done
done

echo
echo "Placement of weak columns: all kernels of one product, the order of activations included, over those of"
echo "tail ($oc x $ic, 4 bits, g = $group, k = $k; indexed: any columns; per_head: 32 heads):"
echo
echo "| capability | tokens | placement | warp instructions | bytes of requested sectors | with those of stores |"
echo "|---|---|---|---|---|---|"
for cc in 80 90; do
  for tokens in 1 8 16; do
    for placement in tail indexed per_head; do
      CUDASIM_CC=$cc CUDASIM_STATS=$scratch/$placement "$sim/bin/cudasim" run "$scratch/probe" \
        $oc $ic 4 $group $k $tokens $placement >/dev/null
    done
    python3 - "$scratch" $cc $tokens <<'P'
import json, sys
scratch, cc, tokens = sys.argv[1], *map(int, sys.argv[2:])
def totals(placement):
    kernels = [json.loads(line) for line in open(f"{scratch}/{placement}")]
    loads = sum(k["global_load"]["sectors"] + k["bulk_load"]["sectors"] for k in kernels)
    stores = sum(k["global_store"]["sectors"] for k in kernels)
    return sum(k["warp_instructions"] for k in kernels), loads, loads + stores
tail = totals("tail")
for placement in ("indexed", "per_head"):
    ratios = [x / of_tail for x, of_tail in zip(totals(placement), tail)]
    print(f"| {cc / 10} | {tokens} | {placement} | " + " | ".join(f"{r:.3f}" for r in ratios) + " |")
P
    rm -f "$scratch"/{tail,indexed,per_head}
  done
done

echo
echo "Machine code of the main loop (g = $group). In flight: what the warps of the least busy"
echo "multiprocessor have asked for when they begin, of 4096 x 4096 where a warp takes 32 rows, and of"
echo "1024 x 4096 where it takes 16:"
echo
echo "| architecture | bits | rows x tokens of a warp | registers | spills | thread instructions per 32 weights | bound by | compute : memory | in flight per SM, KiB |"
echo "|---|---|---|---|---|---|---|---|---|"
# few_tokens_product::shared_bytes of 32 rows and 16 tokens: sums of nine parts and, for five warps,
# two stages of 128 columns, or of 256 in a cluster, and 16 bytes for each token, or in each stage.
sums=$((9 * 32 * 16 * 4))
for job in "sm_80 $((sums + 5 * 16 * (2 * 128 * 2 + 16)))" \
  "sm_90a $((sums + 5 * 16 * 2 * (256 * 2 + 16)))"; do
  read -r arch shared <<<"$job"
  python3 "$QEFT_SASS_REPORT" "$root/tests/cuda/kernels.cu" --arch $arch --kernel "few_tokens.*, 128" \
    --block 160 --dynamic-smem "$shared" --json -- -std=c++17 -I "$root/include" >"$scratch/sass.json" 2>/dev/null
  python3 - "$scratch/sass.json" $arch <<'P'
import json, re, sys
kernels = json.load(open(sys.argv[1]))
kernels = kernels if isinstance(kernels, list) else [kernels]
rows = []
for k in kernels:
    m = re.match(r".*few_tokens<(\d+), (\d+), 128l?, 1, .*quant_format<(\d+)[^<>]*half_bits>", k["kernel"])
    if not m:
        continue
    row_tiles, token_tiles, bits = map(int, m.groups())
    # The loop over chunks of 512 columns; its main path leaves out what only the last chunk does.
    loop = max((l for l in k["loops"] if l["by_opcode"].get("HFMA2", 0) > 0),
               key=lambda l: (l["by_opcode"].get("HMMA", 0), -l["instructions"]))
    code_bytes = row_tiles * 16 * 512 * bits // 8
    cycles_per_byte = 4 * k["sms"] * k["clock_ghz"] / k["bandwidth_gbs"]
    memory = code_bytes * cycles_per_byte
    # Codes have two loads each, of which one serves the end of a row; and the tool leaves out what
    # copies activations on sm_80, because a loop for that end is beside it. A byte of a lane takes
    # the load-store unit a cycle.
    code_loads = [a for a in loop["accesses"] if a["op"].startswith("LDG") and re.search(r"\.(128|64)\.", a["op"])]
    twice = sum(a["bytes_per_thread"] for a in code_loads) - code_bytes // 32
    copied = 0 if loop["by_opcode"].keys() & {"SYNCS", "LDGSTS"} else 2 * 512 * 8 * token_tiles // 32
    more = copied // 16 - sum(a["count"] for a in code_loads) * twice // (twice + code_bytes // 32)
    instructions = loop["instructions"] + more
    cycles = {"issue": loop["issue_cycles"] + more, **loop["pipe_cycles"]}
    cycles["lsu"] += copied - twice
    bound = max(cycles, key=cycles.get)
    # As tuning::plan_warps: eight parts of dense columns and one of weak ones.
    blocks = (4096 if row_tiles == 2 else 1024) // (16 * row_tiles)
    nine = row_tiles == 1
    side_by_side = max(1, min(blocks // k["sms"], k["occupancy"]["blocks"]))
    chunks = 8 if nine else 4 if sys.argv[2] == "sm_80" else 8  # loaded, or asked for
    dense = side_by_side * chunks * (8 * 512 if bits == 4 else 4 * 768)
    in_flight = (dense + side_by_side * 4 * 2 * 512) * row_tiles / 1024
    rows.append((bits, token_tiles, row_tiles,
                 f"| {sys.argv[2]} | {bits} | {16 * row_tiles} x {8 * token_tiles} | {k['registers']} "
                 f"| {k['spill_stores'] + k['spill_loads']} | {instructions / (8 * row_tiles):.1f} "
                 f"| {bound} | {cycles[bound] / memory:.2f} | {in_flight:.0f} |"))
for row in sorted(rows, key=lambda r: (-r[0], *r[1:3])):
    print(row[3])
P
done

if [ -n "${QEFT_MARLIN:-}" ]; then
  echo
  echo "Marlin's kernel for 1 to 16 tokens, read by the same tool: 4 bits, symmetric, g = 128, no weak columns"
  echo "(a block of 8 warps takes 128 rows; its loop multiplies 4 stages of 128 columns):"
  echo
  echo "| architecture | registers | spills | thread instructions per 32 weights | bound by | compute : memory |"
  echo "|---|---|---|---|---|---|"
  for arch in sm_80 sm_90a; do
    python3 "$QEFT_SASS_REPORT" "$QEFT_MARLIN" --arch $arch --kernel 'Marlin<256, 1, 8, 8, 4, 8>' \
      --dynamic-smem 98304 --bits 4 --bytes-per-iter $((4 * 128 * 128 / 2 / 8)) --json \
      -- -std=c++17 --expt-relaxed-constexpr >"$scratch/sass.json" 2>/dev/null
    python3 - "$scratch/sass.json" $arch <<'P'
import json, sys
k = json.load(open(sys.argv[1]))
k = k[0] if isinstance(k, list) else k
loop = max(k["loops"], key=lambda l: l["by_opcode"].get("HMMA", 0))
print(f"| {sys.argv[2]} | {k['registers']} | {k['spill_stores'] + k['spill_loads']} "
      f"| {loop['instructions_per_32_weights']:.1f} | {loop['bound_by']} | {loop['compute_over_memory']:.2f} |")
P
  done
fi

echo
echo "Cycles of the main loop of other kernels on a sub-partition (4 and 3 bits, FP16, g = $group): per round of"
echo "the loop and warp, on the issue port and on each unit."
echo
echo "| architecture | kernel | bits | registers | spills | issue | tensor | alu | fma | lsu | bound by |"
echo "|---|---|---|---|---|---|---|---|---|---|---|"
for job in "sm_80 kernels.cu many_tokens<2,.128" "sm_90a kernels_sm90.cu many_tokens_sm90<128,.128" \
  "sm_80 backward_kernels.cu input_gradient<true" "sm_90a backward_kernels.cu input_gradient<true"; do
  read -r arch source kernel <<<"$job"
  python3 "$QEFT_SASS_REPORT" "$root/tests/cuda/$source" --arch "$arch" --kernel "$kernel" --json \
    -- -std=c++17 -I "$root/include" >"$scratch/sass.json" 2>/dev/null
  python3 - "$scratch/sass.json" "$arch" <<'P'
import json, re, sys
kernels = json.load(open(sys.argv[1]))
for k in kernels if isinstance(kernels, list) else [kernels]:
    m = re.match(r"(?:void )?qeft::kernel::(\w+)<(\w+),.*?quant_format<(\d+), -2l?, \(qeft::zero_kind\)1, qeft::half_bits>", k["kernel"])
    if not m:
        continue
    loop = max(k["loops"], key=lambda l: l["pipe_cycles"].get("tensor", 0))
    pipes = {"issue": loop["issue_cycles"], **loop["pipe_cycles"]}
    cells = " | ".join(f"{pipes.get(name, 0):.0f}" for name in ("issue", "tensor", "alu", "fma", "lsu"))
    print(f"| {sys.argv[2]} | {m[1]}<{m[2]}> | {m[3]} | {k['registers']} "
          f"| {k['spill_stores'] + k['spill_loads']} | {cells} | {max(pipes, key=pipes.get)} |")
P
done
