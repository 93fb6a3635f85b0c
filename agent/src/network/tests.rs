use super::address::{Mac, Prefix, ip};

#[test]
fn hardware_addresses_are_taken_in_one_form_only() {
    let mac = Mac::parse("mac", "02:00:5E:10:00:fF").unwrap();
    assert_eq!(mac.bytes(), [2, 0, 0x5e, 0x10, 0, 0xff]);
    for bad in [
        "",
        "02:00:5e:10:00",
        "02:00:5e:10:00:ff:01",
        "2:0:5e:10:0:ff",
        "+2:00:5e:10:00:ff",
        "gg:00:5e:10:00:ff",
    ] {
        assert!(Mac::parse("mac", bad).is_err(), "{bad:?}");
    }
}

#[test]
fn prefixes_have_a_network_and_a_broadcast_address() {
    let prefix = Prefix::parse("address", "10.1.2.3/20").unwrap();
    assert_eq!(prefix.network().address, ip("", "10.1.0.0").unwrap());
    assert_eq!(prefix.broadcast(), Some(ip("", "10.1.15.255").unwrap()));
    assert_eq!(
        Prefix::parse("address", "10.1.2.3").unwrap().broadcast(),
        None
    );
    let all = Prefix::parse("address", "10.1.2.3/0").unwrap();
    assert_eq!(all.network().address, ip("", "0.0.0.0").unwrap());
    assert_eq!(all.broadcast(), Some(ip("", "255.255.255.255").unwrap()));
    let six = Prefix::parse("address", "fd00::1:2/64").unwrap();
    assert_eq!(six.network().address, ip("", "fd00::").unwrap());
    assert_eq!(six.broadcast(), None);
    for bad in [
        "10.0.0.1/33",
        "10.0.0.1/-1",
        "10.0.0.1/",
        "fd00::/129",
        "/8",
        "host/8",
    ] {
        assert!(Prefix::parse("address", bad).is_err(), "{bad:?}");
    }
}
