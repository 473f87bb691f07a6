"""Makes the secrets that docker-compose.yml mounts, each in a file of its own: `make_secrets.py [FOLDER]`.

What is there stays as it is. The folder is for its owner alone; the files in it can be read by whoever has them
mounted, because in a container their owner is somebody else.
"""

import secrets
import sys
from pathlib import Path

BROKER_CONF = """\
requirepass {password}
dir /data
appendonly yes
appendfsync everysec
save ""
auto-aof-rewrite-min-size 512mb
rdbcompression no
maxmemory-policy noeviction
protected-mode no
"""

OBJECTS_ENV = """\
MINIO_ROOT_USER=longshore
MINIO_ROOT_PASSWORD={password}
"""

# Read by every service that touches the object store; of no effect while LONGSHORE_STORE_URL is a folder.
S3_ENV = """\
AWS_ACCESS_KEY_ID=longshore
AWS_SECRET_ACCESS_KEY={password}
AWS_ENDPOINT_URL=http://objects:9000
AWS_ALLOW_HTTP=true
AWS_REGION=us-east-1
"""


def make(folder: Path) -> list[str]:
    """Returns the names of the files that were made."""
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    broker, database, objects = (secrets.token_hex(24) for _ in range(3))
    # Two files say each password: they are made together, or not at all.
    together = [
        {"api_key": secrets.token_urlsafe(32) + "\n"},
        {
            "broker.conf": BROKER_CONF.format(password=broker),
            "longshore_broker_url": f"redis://:{broker}@broker:6379/0\n",
        },
        {
            "postgres_password": database,
            "longshore_database_url": f"postgresql+asyncpg://longshore:{database}@database/longshore\n",
        },
        {"grafana_password": secrets.token_urlsafe(18)},
        {
            "objects.env": OBJECTS_ENV.format(password=objects),
            "s3.env": S3_ENV.format(password=objects),
        },
    ]
    made = []
    for files in together:
        if any((folder / name).exists() for name in files):
            continue
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o444)
            made.append(name)
    return made


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "secrets")
    new = make(target)
    sys.stdout.write(f"{target}: made {', '.join(new)}\n" if new else f"{target}: everything is there already\n")
