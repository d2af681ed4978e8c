"""
Train with tensor parallelism in pairs of ranks, and FSDP2 over the pairs. The four lines of snapshotd are marked; the
rest is an ordinary script.
"""

import lab
import torch
import torch.distributed as dist
from snapshotd_client import Snapshotter  # snapshotd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

args = lab.arguments()
dist.init_process_group("gloo")
lab.seed()
mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
share = mesh.get_local_rank("dp")
model = lab.build_model(args)
for block in model.blocks:
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
fully_shard(model, mesh=mesh["dp"])
optimizers = lab.build_optimizers(args, model)
scheduler = lab.build_scheduler(args, optimizers[0])
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5, enabled=args.amp)
position = lab.Position()
notes = lab.Notes(model, optimizers, {"scheduler": scheduler, "scaler": scaler, "position": position})
extra = {"data": position}

snap = Snapshotter(model=model, optimizer=optimizers, scheduler=scheduler, scaler=scaler, extra=extra)  # snapshotd
first = snap.restore()  # snapshotd
notes.restored(first)
# The two ranks of a pair compute one forward pass, so they must draw the same numbers, whoever's were restored.
torch.manual_seed(lab.SEED + 100 * first + share)
for step, batch in zip(range(first, args.steps), lab.batches(args, position, share, mesh.size(0)), strict=False):
    loss = lab.loss_of(args, model, batch)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    for optimizer in optimizers:
        optimizer.zero_grad()
    position.batch += 1
    notes.step(step, loss)
    snap.capture(step)  # snapshotd
    notes.hold(step)
notes.finish()
dist.destroy_process_group()
