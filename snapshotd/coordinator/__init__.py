"""The coordinator: one pure core, and around it a gRPC service, a store and the torchrun rendezvous."""
