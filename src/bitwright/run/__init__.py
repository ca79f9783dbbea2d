"""What makes a run survive: whole files, checked checkpoints, one writer, and the old run or the new one."""
