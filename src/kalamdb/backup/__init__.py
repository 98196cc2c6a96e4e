"""Backup and restore: consistent copies of an open database, verified, shared between each other, and put back.

`targets` says where backups lie, `manifest` what one holds, `take` makes one, `listing` finds, verifies and
prunes them, `restore` stages one as a further generation of a data directory, `adopt` starts what was restored.
"""

from kalamdb.backup.service import Backups
from kalamdb.backup.take import DatabaseIdentity
from kalamdb.backup.targets import job_path

__all__ = ["Backups", "DatabaseIdentity", "job_path"]
