"""Train with FSDP2. The four lines of snapshotd are marked; the rest is an ordinary script."""

import lab
import torch
import torch.distributed as dist
from snapshotd_client import Snapshotter  # snapshotd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

args = lab.arguments()
dist.init_process_group("gloo")
lab.seed()
model = lab.build_model(args)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for block in getattr(model, "blocks", []):
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizers = lab.build_optimizers(args, model)
scheduler = lab.build_scheduler(args, optimizers[0])
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5, enabled=args.amp)
position = lab.Position()
torch.manual_seed(lab.SEED + dist.get_rank())  # dropout differs between ranks
notes = lab.Notes(model, optimizers, {"scheduler": scheduler, "scaler": scaler, "position": position})
extra = {"data": position}

snap = Snapshotter(model=model, optimizer=optimizers, scheduler=scheduler, scaler=scaler, extra=extra)  # snapshotd
first = snap.restore()  # snapshotd
notes.restored(first)
for step, batch in zip(range(first, args.steps), lab.batches(args, position), strict=False):
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
