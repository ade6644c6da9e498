"""python launch/check_devices.py N: do all hosts together see N devices that answer?

To be started on every host at once, as the run itself. Exits 1 where they do not.
"""

import sys

from safemoe_jax.parallel.hosts import connect


def main(expected: int) -> int:
    connect()
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("all",))
    ones = jax.make_array_from_callback(
        (mesh.size,),
        NamedSharding(mesh, PartitionSpec("all")),
        lambda index: np.ones(mesh.size, np.float32)[index],
    )
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
    print(
        f"devices: host {jax.process_index()} of {jax.process_count()} has "
        f"{jax.local_device_count()} {jax.devices()[0].device_kind}; together {int(total)}, "
        f"expected {expected}"
    )
    return int(int(total) != expected)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
