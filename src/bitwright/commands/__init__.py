"""What each verb of the command line does, in calls to the library; `bitwright.cli` declares their arguments."""
