from bdcli.cli.main import main

main()
